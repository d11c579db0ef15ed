"""Integrated gradients: a number's change from a baseline to the input, shared out exactly."""

from __future__ import annotations

import numpy as np
import torch

from heedful.checks import check_positive
from heedful.inspect.attribution import Attribution
from heedful.inspect.target import Target
from heedful.registry import register


@register(
    "integrated-gradients", kind="inspect", paper="song-of-disagreement", tags=("attribution", "gradient")
)
def integrated_gradients(target: Target, *, steps: int = 32) -> Attribution:
    """The gradient's mean over the straight way from the baseline to the input, times that way.

        s_j = (x_j - b_j) . int_0^1 df/dx_j (b + t (x - b)) dt;   sum_j s_j = f(x) - f(b)

    target  the number f, its input x and baseline b, (m, c)
    steps   points of the integral (Gauss-Legendre, denser near the baseline); `completeness_gap` tells
            whether they were enough

    Parts that always stay get 0. Source: arXiv 1703.01365.
    """
    check_positive("steps", steps)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    u, w = (nodes + 1) / 2, weights / 2
    # t = u^3: norms of layers make a number turn sharply near a baseline of zeros.
    t, share = (torch.from_numpy(y).to(target.x) for y in (u**3, 3 * u**2 * w))
    start = target.x - target.change
    total = torch.zeros_like(target.x)
    for at, own in zip(t.split(16), share.split(16), strict=True):
        slope = target.gradient(start + at[:, None, None] * target.change)
        total += (own[:, None, None] * slope).sum(0)
    return Attribution(
        "integrated gradients", target.tokens, (target.change * total).sum(-1).cpu(), target.grid
    )


def completeness_gap(target: Target, attribution: Attribution) -> float:
    """sum_j s_j - (f(x) - f(b)): 0 for attributions that share out all of the change and no more."""
    return float(attribution.scores.sum()) - (target.with_all() - target.with_none())
