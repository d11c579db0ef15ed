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
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
    """Hooks that keep sum_i (w_i - 1) c_i over the paths so far, nothing else, and add it to the sum.

    They are methods, so that a copy of a network has hooks on itself.
    """

    def __init__(self, components: int, weights: Weights | Callable[[], Weights]) -> None:
        self.components, self.given = components, weights
        self.weights = self.total = torch.empty(0)

    def start(self, module: nn.Module, given: Any) -> None:
        self.weights = self.given() if callable(self.given) else self.given
        if len(self.weights) != self.components:
            raise ValueError(f"weights are for {len(self.weights)} paths, must be for {self.components}")
        self.total = (self.weights[0] - 1) * _input(given)

    def branch(self, place: int, module: nn.Module, given: Any, out: Any) -> None:
        # By its place and not by counting, since checkpointing runs branches again.
        self.total = self.total + (self.weights[place] - 1) * _output(out)

    def end(self, module: nn.Module, given: Any) -> tuple[Any, ...]:
        return _input(given) + self.total, *given[1:]


def reweigh(paths: ResidualPaths, weights: Weights | Callable[[], Weights]) -> list[RemovableHandle]:
    """`reweighted` for good, or until the handles are removed. Copies of the network are reweighed, too."""
    running = _Running(paths.components, weights)
    return [
        paths.first.register_forward_pre_hook(running.start),
        *(
            branch.register_forward_hook(partial(running.branch, place))
            for place, branch in enumerate(paths.branches, start=1)
        ),
        paths.last.register_forward_pre_hook(running.end),
    ]


@contextmanager
def reweighted(paths: ResidualPaths, weights: Weights | Callable[[], Weights]) -> Iterator[None]:
    """Inside this context the classifier sees sum_i w_i * c_i in place of the sum of the paths.

    weights: one a path, or one a path and channel, or a function that gives them at each forward (such as
    `EnsembleScale.table`, which learns them). With ones the output is the same to the last bit. Zeros cut:
    trained so, a network has these paths pruned (`heedful.convert.prune_paths`).
    Raises ValueError in the forward if there is not a weight for each path.
    """
    handles = reweigh(paths, weights)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rescaled(paths: ResidualPaths, weights: Weights | Callable[[], Weights]) -> Iterator[None]:
    """Inside this context what each branch adds is scaled within the network: x <- x + w_i branch_i(x).

    The other form of the weights, like a LayerScale: later layers and the classifier see it alike. weights:
    one a branch, or one a branch and channel, or a function that gives them at each forward; no weight is for
    x_0. With ones the output is the same to the last bit.
    Raises ValueError in the forward if there is not a weight for each branch.
    """

    def scaled(place: int, module: nn.Module, given: Any, out: Any) -> Any:
        table = weights() if callable(weights) else weights
        if len(table) != len(paths.branches):
            raise ValueError(f"weights are for {len(table)} branches, must be for {len(paths.branches)}")
        y = table[place] * _output(out)
        return y if isinstance(out, Tensor) else (y, *out[1:])

    handles = [branch.register_forward_hook(partial(scaled, i)) for i, branch in enumerate(paths.branches)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def residual_paths(model: nn.Module) -> ResidualPaths:
    """Where a model adds to its residual stream.

    model  of transformers, llama, mistral, qwen2, qwen3 or vit by its model_type, or a VisionTransformer of
           timm

    Raises ValueError for any other model, which needs a `ResidualPaths` of its own, and where dropout stands
    between a branch and its sum.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    inner: Any = getattr(model, "base_model", model)
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        branches = [part for layer in inner.layers for part in (layer.self_attn, layer.mlp)]
        return ResidualPaths(inner.layers[0].input_layernorm, branches, inner.norm)
    if kind == "vit":
        if config.hidden_dropout_prob:  # type: ignore[union-attr]
            raise ValueError(
                f"model has hidden_dropout_prob {config.hidden_dropout_prob}, must be 0"  # type: ignore[union-attr]
            )
        branches = [part for layer in inner.layers for part in (layer.attention, layer.mlp)]
        return ResidualPaths(inner.layers[0].layernorm_before, branches, inner.layernorm)
    if kind == "VisionTransformer" and hasattr(inner.blocks[0], "drop_path1"):
        branches = [part for block in inner.blocks for part in (block.drop_path1, block.drop_path2)]
        return ResidualPaths(inner.blocks[0].norm1, branches, inner.norm)
    raise ValueError(
        f"model is of type {kind!r}, must be llama, mistral, qwen2, qwen3, vit or a VisionTransformer of timm"
    )


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
