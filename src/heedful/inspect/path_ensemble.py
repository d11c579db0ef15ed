"""A pre-norm network as a sum of paths: taking it apart, cutting paths, weighing them, and what they hold.

Layer l adds the output of its attention and then that of its feed-forward part to the residual stream, so

    x_L = x_0 + sum_l (a_l + f_l)

enters the last norm and the classifier. The terms are the paths here, in the order x_0, a_0, f_0, a_1, ...
Cutting or weighing one changes only what the classifier sees; inside the network all goes on as before.
Source: Path Ensemble, arXiv 2308.06548.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.registry import register

Weights = Float[Tensor, "components"] | Float[Tensor, "components c"]


@dataclass(frozen=True, eq=False)
class ResidualPaths:
    """Where a network adds to its residual stream.

    first     the module whose input is x_0, such as the first norm of the first layer
    branches  the modules whose outputs are added, in order: attention and feed-forward part of each layer,
              or what still scales or drops them (in timm `block.drop_path1`, `block.drop_path2`)
    last      the module whose input is the sum: the norm before the classifier
    """

    first: nn.Module
    branches: Sequence[nn.Module]
    last: nn.Module

    @property
    def components(self) -> int:
        return 1 + len(self.branches)


def path_components(paths: ResidualPaths, run: Callable[[], object]) -> list[Float[Tensor, "b n c"]]:
    """The paths of one forward, which `run` makes; their sum is what `paths.last` is given.

    Raises ValueError if it is not: then branches are missing, or the network is not pre-norm.
    """
    found: list[Tensor] = []
    total: list[Tensor] = []
    handles = [paths.first.register_forward_pre_hook(lambda module, given: found.append(_input(given)))]
    for branch in paths.branches:
        handles.append(branch.register_forward_hook(lambda module, given, out: found.append(_output(out))))
    handles.append(paths.last.register_forward_pre_hook(lambda module, given: total.append(_input(given))))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != paths.components or len(total) != 1:
        raise ValueError(
            f"paths gave {len(found)} components and {len(total)} sums in a run, must give "
            f"{paths.components} and 1"
        )
    with torch.no_grad():
        wide = torch.stack([x.double() for x in found])
        # Sums in another order differ by rounding, of the largest term.
        error = (wide.sum(0) - total[0]).abs().max() / wide.abs().max()
        if error > 8 * paths.components * torch.finfo(total[0].dtype).eps:
            raise ValueError(
                f"paths do not add up to what `last` is given (relative difference {float(error):.1e}): "
                "branches are missing, or the network is not pre-norm"
            )
    return found


class _Running:
    """sum_i (w_i - 1) c_i over the paths so far; nothing else is kept."""

    weights: Tensor
    total: Tensor
    place: int

    def start(self, weights: Tensor, components: int) -> None:
        if len(weights) != components:
            raise ValueError(f"weights are for {len(weights)} paths, must be for {components}")
        self.weights, self.place = weights, 0

    def add(self, component: Tensor) -> None:
        step = (self.weights[self.place] - 1) * component
        self.total = self.total + step if self.place else step
        self.place += 1


@contextmanager
def reweighted(paths: ResidualPaths, weights: Weights | Callable[[], Weights]) -> Iterator[None]:
    """Inside this context the classifier sees sum_i w_i * c_i in place of the sum of the paths.

    weights: one a path, or one a path and channel, or a function that gives them at each forward (such as
    `EnsembleScale.table`, which learns them). With ones the output is the same to the last bit. Zeros cut:
    trained so, a network has these paths pruned.
    Raises ValueError in the forward if there is not a weight for each path.
    """
    running = _Running()

    def start(module: nn.Module, given: Any) -> None:
        running.start(weights() if callable(weights) else weights, paths.components)
        running.add(_input(given))

    handles = [paths.first.register_forward_pre_hook(start)]
    for branch in paths.branches:
        handles.append(branch.register_forward_hook(lambda module, given, out: running.add(_output(out))))
    handles.append(
        paths.last.register_forward_pre_hook(
            lambda module, given: (_input(given) + running.total, *given[1:])
        )
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@register("path-ensemble", kind="inspect", paper="path-ensemble", tags=("attribution", "residual", "pruning"))
def ablate_paths(paths: ResidualPaths, evaluate: Callable[[], float]) -> Float[Tensor, " components"]:
    """What `evaluate`, such as an accuracy, gives with each path hidden from the classifier in turn.

    A path whose absence changes nothing can be cut. Source: Path Ensemble, arXiv 2308.06548.
    """
    found = []
    for path in range(paths.components):
        with reweighted(paths, (torch.arange(paths.components) != path).float()):
            found.append(evaluate())
    return torch.tensor(found)


def path_distillation(
    short: Float[Tensor, "*b classes"], long: Float[Tensor, "*b classes"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """The long paths teach the short ones: KL(p_short || p_long), the mean over rows, times temperature^2.

    short, long: logits; no gradient reaches `long`.
    """
    log_short, log_long = ((x / temperature).log_softmax(-1) for x in (short, long.detach()))
    return F.kl_div(log_long, log_short, reduction="none", log_target=True).sum(-1).mean() * temperature**2


def relative_log_amplitude(
    tokens: Float[Tensor, "b n c"], shape: tuple[int, int]
) -> Float[Tensor, " frequencies"]:
    """How much tokens on a grid vary, by frequency: the log amplitude of their 2-D Fourier transform.

    Entry i is the mean over batch, channels and the frequencies whose larger coordinate, in units of half
    the sampling rate, rounds to i / (k - 1), k = min(shape) // 2 + 1; relative to entry 0, the constant.
    Flat for noise, falling where neighbours are alike. ValueError if the shape is not that of the tokens.
    """
    height, width = shape
    if height * width != tokens.shape[1]:
        raise ValueError(f"shape is {shape}, must have {tokens.shape[1]} places, as many as tokens")
    grid = tokens.unflatten(1, shape)
    amplitude = torch.fft.fft2(grid, dim=(1, 2)).abs().mean((0, 3))
    last = min(shape) // 2
    axes = (2 * torch.fft.fftfreq(side, device=tokens.device).abs() for side in shape)
    rows, columns = axes
    ring = (torch.maximum(rows[:, None], columns) * last).round().long().flatten()
    total = amplitude.new_zeros(last + 1).index_add(0, ring, amplitude.flatten())
    logs = (total / torch.bincount(ring, minlength=last + 1)).log()
    return logs - logs[0]


def _input(given: Any) -> Tensor:
    if not given or not isinstance(given[0], Tensor):
        raise ValueError("first and last must be given their tokens as the first positional argument")
    return given[0]


def _output(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]
