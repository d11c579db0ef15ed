"""LIME: a linear model of what parts do, fitted to inputs with random parts left out."""

from __future__ import annotations

import torch

from heedful.checks import check_positive
from heedful.inspect.attribution import Attribution
from heedful.inspect.target import Target
from heedful.registry import register


@register("lime", kind="inspect", paper="song-of-disagreement", tags=("attribution", "perturbation"))
def lime(target: Target, *, samples: int = 1000, ridge: float = 1.0, seed: int = 0) -> Attribution:
    """The coefficients of a weighted ridge regression of f on which parts are there.

        min_{s, a} sum_k w_k (f_k - a - s . z_k)^2 + ridge ||s||^2;   w = exp(-(1 - cos(z, 1))^2 / 0.25^2 / 2)

    target   the number f and its m parts; parts that always stay are left out of the fit and get 0
    samples  inputs whose parts are each there with probability 1/2, one of them with all
    ridge    how much large coefficients cost; the intercept a costs nothing

    Source: arXiv 1602.04938, with the kernel of its code for texts and the samples of arXiv 2205.04559.
    """
    check_positive("samples", samples)
    free = target.free.cpu()
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(samples, int(free.sum()), generator=generator) < 0.5
    there[0] = True
    kept = torch.ones(samples, len(free), dtype=torch.bool)
    kept[:, free] = there
    f, z = target.with_parts(kept).cpu().double(), there.double()
    apart = 1 - z.mean(1).sqrt()  # z holds zeros and ones, so cos(z, 1) is the root of their mean
    weight = torch.exp(-((apart / 0.25) ** 2) / 2)
    weight = weight / weight.sum()
    centred = z - weight @ z
    gram = centred.T @ (weight[:, None] * centred) * samples + ridge * torch.eye(z.shape[1]).double()
    found = torch.linalg.solve(gram, samples * centred.T @ (weight * (f - weight @ f)))
    scores = torch.zeros(len(free), dtype=torch.float64)
    scores[free] = found
    return Attribution("LIME", target.tokens, scores.to(target.x.dtype), target.grid)
