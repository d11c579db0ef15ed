"""Attribution by the gradient alone: how fast a number changes with each part of the input."""

from __future__ import annotations

from heedful.inspect.attribution import Attribution
from heedful.inspect.target import Target
from heedful.registry import register


@register(
    "gradient-attribution", kind="inspect", paper="song-of-disagreement", tags=("attribution", "gradient")
)
def gradient(target: Target) -> Attribution:
    """||df/dx_j||: how sensitive the number is to part j, whichever way.

    target  the number f and its input x (m, c)
    """
    scores = target.gradient(target.x[None])[0].norm(dim=-1)
    return Attribution("gradient", target.tokens, scores.cpu(), target.grid)


@register(
    "gradient-times-input", kind="inspect", paper="song-of-disagreement", tags=("attribution", "gradient")
)
def gradient_times_input(target: Target) -> Attribution:
    """(x_j - b_j) . df/dx_j: what part j adds over the baseline b if f were a plane.

    target  the number f, its input x and baseline b, (m, c); with b = 0 it is gradient times input

    Parts that always stay get 0. Where f is linear the scores sum to f(x) - f(b).
    """
    scores = (target.change * target.gradient(target.x[None])[0]).sum(-1)
    return Attribution("gradient × input", target.tokens, scores.cpu(), target.grid)
