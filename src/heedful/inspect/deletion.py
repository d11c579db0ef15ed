"""How well a ranking of parts predicts what a number does when they are taken away, or put in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.inspect.attribution import Attribution
from heedful.inspect.target import Target
from heedful.registry import register


@dataclass(frozen=True, eq=False)
class Curve:
    """A number by the share of parts that were taken away or put in; `area` is that below it."""

    shares: Float[Tensor, " k"]  # from 0 to 1
    values: Float[Tensor, " k"]

    @property
    def area(self) -> float:
        """By the trapezoid rule, in the unit of the number."""
        return float(torch.trapezoid(self.values, self.shares))

    def between(self, none: float, everything: float) -> Curve:
        """The same with `none` at 0 and `everything` at 1. ValueError if they are equal."""
        if none == everything:
            raise ValueError(f"none and everything are both {none}, must differ")
        return Curve(self.shares, (self.values - none) / (everything - none))


def _without_most(scores: Tensor, counts: Tensor) -> Bool[Tensor, "k m"]:
    """Masks that lack the `counts` parts with the highest scores."""
    rank = scores.argsort(descending=True, stable=True).argsort()
    return rank >= counts[:, None]


def _counts(parts: int, steps: int) -> Tensor:
    return torch.linspace(0, parts, steps + 1).round().long().unique()


@register("deletion-curve", kind="inspect", paper="cross-attention-half-explanation", tags=("attribution",))
def deletion_curve(target: Target, attribution: Attribution, *, steps: int = 20) -> Curve:
    """The number as its highest parts go, one share after the other: a small area speaks for the ranking.

    steps  points of the curve after the first, evenly; with fewer parts one point a part

    Parts that always stay do so. Source: arXiv 1806.07421 (pixels), arXiv 2509.18010 (speech).
    """
    return _curve(target, attribution.scores, steps, insert=False)


@register("insertion-curve", kind="inspect", paper="cross-attention-half-explanation", tags=("attribution",))
def insertion_curve(target: Target, attribution: Attribution, *, steps: int = 20) -> Curve:
    """The number as its highest parts come back to an empty input: a large area speaks for the ranking.

    steps  points of the curve after the first, evenly; with fewer parts one point a part

    Source: arXiv 1806.07421.
    """
    return _curve(target, attribution.scores, steps, insert=True)


def _curve(target: Target, scores: Tensor, steps: int, *, insert: bool) -> Curve:
    check_positive("steps", steps)
    free = target.free.cpu()
    if len(scores) != len(free):
        raise ValueError(f"attribution has {len(scores)} scores, must have {len(free)}, one a part")
    counts = _counts(int(free.sum()), steps)
    kept = torch.ones(len(counts), len(free), dtype=torch.bool)
    without = _without_most(scores[free], counts)
    kept[:, free] = ~without if insert else without
    return Curve(counts / counts[-1].clamp(min=1), target.with_parts(kept).float().cpu())


@register("deletion-auc", kind="inspect", paper="cross-attention-half-explanation", tags=("attribution",))
def deletion_auc(
    saliency: Float[Tensor, "*shape"],
    quality: Callable[[Bool[Tensor, "*shape"]], float],
    *,
    steps: int = 20,
) -> float:
    """The area below a quality of the output as the most salient 0, 5, ..., 100 % of the input are occluded.

    saliency  of each feature, such as (frames, channels) of a spectrogram
    quality   of what the model puts out where only the features of a mask are kept: a word error rate, BLEU
    steps     20 makes shares of 5 %

    Source: arXiv 2509.18010.
    """
    check_positive("steps", steps)
    counts = _counts(saliency.numel(), steps)
    kept = _without_most(saliency.flatten(), counts.to(saliency.device))
    values = torch.tensor([float(quality(mask.view(saliency.shape))) for mask in kept])
    return Curve(counts / counts[-1].clamp(min=1), values).area
