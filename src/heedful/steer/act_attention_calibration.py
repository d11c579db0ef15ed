"""Attention calibration: tokens that draw too much attention are damped, the others get the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.hf.tap import Site
from heedful.registry import register
from heedful.steer.intervention import Intervention


def received(
    weights: Float[Tensor, "b h n m"], mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "b h m"]:
    """The mean attention that a token gets from the queries that can see it, in float32, for n = m causal
    weights.

        c_j = sum_i a_ij / (n - j)

    mask  False = padding on the left, whose rows do not count
    """
    n = weights.shape[2]
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, :, None], 0.0)
    return weights.float().sum(2) / torch.arange(n, 0, -1, device=weights.device)


def excessive(scores: Float[Tensor, "b h m"], threshold: float) -> Bool[Tensor, "b h m"]:
    """Tokens with a score above the threshold, but for the first of a head, taken for the initial sink."""
    above = scores > threshold
    return above & (above.cumsum(-1) > 1)


def calibrate(
    weights: Float[Tensor, "b h n m"], sinks: Bool[Tensor, "b h m"], beta: float
) -> Float[Tensor, "b h n m"]:
    """Keep the share beta of the weight of sinks, and spread the rest over the other tokens of the row.

        a'_j = beta a_j for sinks;   a'_j = a_j (1 + (1 - beta) sum_{sinks} a / sum_{others} a) for the others

    Rows keep their sums; a row that sees sinks alone stays as it is. Source: arXiv 2406.15765.
    """
    on_sink = sinks[:, :, None]
    rest = weights.masked_fill(on_sink, 0.0)
    rest_sum = rest.sum(-1, keepdim=True)
    freed = (1 - beta) * weights.masked_fill(~on_sink, 0.0)
    moved = (
        weights
        - freed
        + freed.sum(-1, keepdim=True) * rest / rest_sum.clamp_min(torch.finfo(rest.dtype).tiny)
    )
    return torch.where(rest_sum > 0, moved, weights)


@register("attention-calibration", kind="steer", paper="act-attention-calibration", tags=("sink",))
@dataclass(eq=False)
class AttentionCalibration(Intervention):
    """Damps attention sinks other than the first, in chosen heads, and gives their weight to the other
    tokens.

    Sinks are found in the prompt, head by head: tokens whose mean received attention is above the threshold
    (`received`, `excessive`). Tokens generated later are treated as rows of the same prompt: its sinks stay
    damped.

    beta        share of its weight that a sink keeps; 1: nothing changes
    threshold   of the mean attention received
    heads       query heads by layer, e.g. {2: [0, 5]}; None: all heads
    layers      changed layers, where heads is None; None: all but the first two and the last

    Left padding is known from the model's mask. Raises ValueError if beta is not in [0, 1].
    Source: ACT, arXiv 2406.15765.
    """

    beta: float = 0.4
    threshold: float = 0.1
    heads: Mapping[int, Sequence[int]] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta is {self.beta!r}, must lie in [0, 1]")
        self._sinks: dict[int, Bool[Tensor, "b h m"]] = {}  # by layer, of the prompt

    @property
    def idle(self) -> bool:
        return self.beta == 1.0

    def forget(self) -> None:
        self._sinks.clear()

    def wants(self, site: Site) -> bool:
        if not super().wants(site):
            return False
        if self.heads is not None:
            return site.layer in self.heads
        return 2 <= site.layer < self.reading.layers - 1 if self.layers is None else site.layer in self.layers

    def weights(self, site: Site, weights: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        n = weights.shape[2]
        if n == self.reading.ids.shape[1]:  # a prompt
            mask = site.visibility["key_mask"]
            mask = None if mask is None else mask[:, :n]
            self._sinks[site.layer] = excessive(received(weights[..., :n], mask), self.threshold)
        sinks = self._sinks.get(site.layer)
        if sinks is None or sinks.shape[0] != weights.shape[0]:
            return weights
        sinks = self.reading.on_keys(site, sinks)
        if self.heads is not None:
            chosen = torch.zeros(weights.shape[1], dtype=torch.bool, device=weights.device)
            chosen[list(self.heads[site.layer])] = True
            sinks = sinks & chosen[:, None]
        return calibrate(weights, sinks, self.beta)
