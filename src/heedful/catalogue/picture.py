"""A picture of an entry: the mask of a pattern, the influence map of a mixer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.catalogue.page import pattern_tokens
from heedful.mixers.mixer import Mixer
from heedful.patterns.pattern import Pattern
from heedful.registry import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOKENS, _SIDES = 24, {1: (24,), 2: (6, 6), 3: (3, 4, 3)}


def influence(mixer: Mixer, inputs: dict[str, Tensor]) -> Float[Tensor, "i j"]:
    """How strongly output i depends on input j: the Frobenius norm of their block of the Jacobian.

    i and j are tokens or map positions; channels, for a channel mixer; i are output channels for a pool.
    `inputs` are keyword arguments of `forward` with batch 1. Slow: one backward pass an output number.
    """
    kind = mixer.entry.kind
    x = inputs["x"].detach().requires_grad_()
    made = mixer(**{**inputs, "x": x})
    # To (position, rest): what stands for one row of the map is its first axis.
    out = made.reshape(-1, 1) if kind == "pool" else _rows(made[0], kind)
    strength = []
    for row in out:
        square = torch.zeros(_rows(x[0], kind).shape[0], dtype=x.dtype)
        for number in row:
            (slope,) = torch.autograd.grad(number, x, retain_graph=True, allow_unused=True)
            if slope is not None:
                square = square + _rows(slope[0], kind).square().sum(1)
        strength.append(square.sqrt())
    return torch.stack(strength).detach()


def _rows(x: Tensor, kind: str) -> Tensor:
    """(tokens, channels); for a channel mixer (channels, positions)."""
    if kind == "channel":
        return x.flatten(1)
    return x.flatten(1).T if kind == "grid" else x


def draw(entry: Entry, path: Path) -> None:
    """Write the picture of an entry to a file whose suffix says the format (png, svg, pdf).

    Raises ValueError if the entry has no picture or matplotlib does not know the format.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    made = entry.load()
    example = getattr(made, "example", None)
    pattern = isinstance(made, type) and issubclass(made, Pattern)
    if example is None or not (pattern or entry.is_mixer):
        raise ValueError(f"{entry.name!r} is a {entry.kind} and has no picture; patterns and mixers have")
    figure, ax = plt.subplots(figsize=(4.5, 4), layout="constrained")
    try:
        if pattern:
            shown = made(**example)
            shown.plot(pattern_tokens(shown), ax=ax)
        else:
            _draw_influence(made, ax)
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def _draw_influence(made: type[Mixer], ax: Axes) -> None:
    torch.manual_seed(0)
    mixer = made(**made.example).double().eval()
    kind = mixer.entry.kind
    size = _SIDES[max(mixer.entry.spatial)] if mixer.entry.spatial else None
    inputs = mixer.example_inputs(batch=1, length=_TOKENS, size=size, dtype=torch.float64)
    strength = influence(mixer, inputs)
    drawn = ax.imshow(
        strength / strength.max().clamp(min=1e-30), cmap="Blues", vmin=0, interpolation="nearest"
    )
    of = {"channel": "channel", "grid": "map position (row by row)"}.get(kind, "token")
    ax.set(
        xlabel=f"input {of}",
        ylabel="output channel" if kind == "pool" else f"output {of}",
        title=mixer.entry.name,
    )
    ax.figure.colorbar(drawn, ax=ax, label="root of influence (norm of the Jacobian, largest = 1)")
