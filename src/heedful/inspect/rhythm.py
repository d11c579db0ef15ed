"""Preplan and anchor: where a text looks back for a plan, and which of its tokens later ones hold on to.

Local heads look near; where even they look back far (peaks of WAAD) the model plans the next chunk. Global
heads look far; the tokens that many later ones look at (large FAI) are anchors. Both signals are sums over
rows of weights and means over heads, so they add up over pieces of rows and need no table of a layer:
collect them for every head with `RhythmProfile`, then choose the heads.
Source: arXiv 2510.13554.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.inspect.distance import attention_distance, token_distances
from heedful.inspect.site import Site
from heedful.registry import register


def waad(
    weights: Float[Tensor, "*b r m"], *, queries: Int[Tensor, " r"] | None = None, window: int = 10
) -> Float[Tensor, "*b r"]:
    """Windowed average attention distance: sum_{s <= t} A_ts min(t - s, window). Between 0 and window."""
    back = token_distances(weights, queries).clamp(min=0, max=window)
    return (weights * back.to(weights)).sum(-1)


def future_sums(
    weights: Float[Tensor, "*b r m"],
    *,
    queries: Int[Tensor, " r"] | None = None,
    horizon: tuple[int, int] = (10, 100),
) -> tuple[Float[Tensor, "*b m"], Float[Tensor, " m"]]:
    """What each token gets from the queries between horizon[0] and horizon[1] tokens later, and how many
    they are: sums that add up over pieces of rows.
    """
    back = token_distances(weights, queries)
    later = ((back >= horizon[0]) & (back <= horizon[1])).to(weights)
    return (weights * later).sum(-2), later.sum(-2)


def fai(
    weights: Float[Tensor, "*b r m"],
    *,
    queries: Int[Tensor, " r"] | None = None,
    horizon: tuple[int, int] = (10, 100),
) -> Float[Tensor, "*b m"]:
    """Future attention influence: the mean of A_ts over the rows t with horizon[0] <= t - s <= horizon[1].

    0 where there is no such row.
    """
    total, count = future_sums(weights, queries=queries, horizon=horizon)
    return total / count.clamp(min=1)


def split_local_global_heads(
    distance: Float[Tensor, "*heads"], *, share: float = 0.3
) -> tuple[Bool[Tensor, "*heads"], Bool[Tensor, "*heads"]]:
    """The heads of least and of largest mean distance, a `share` of all (at least one) each."""
    if not 0.0 < share <= 0.5:
        raise ValueError(f"share is {share}, must be above 0 and at most 0.5")
    order = distance.flatten().argsort()
    count = max(1, round(share * len(order)))
    local, far = (torch.zeros(len(order), dtype=torch.bool, device=distance.device) for _ in range(2))
    local[order[:count]] = True
    far[order[-count:]] = True
    return local.view_as(distance), far.view_as(distance)


@register("preplan-anchor", kind="inspect", paper="preplan-anchor", tags=("distance", "influence"))
@dataclass
class RhythmProfile:
    """WAAD and FAI of a text, from the attention of all heads of a causal model, seen row by row.

        profile = RhythmProfile(response=slice(20, None))
        with capture(model, profile):
            model(ids)                       # one text
        profile.waad(), profile.fai()

    response  the tokens of interest; distances and influence are those of their rows alone
    window    W of WAAD;  horizon  H of FAI;  share  of heads that count as local, and as global
    layers    the layers that are looked at; None: all. The paper takes five, evenly between a third and two
              thirds of the depth.

    Cross-attention is left out.
    """

    response: slice = field(default_factory=lambda: slice(None))
    window: int = 10
    horizon: tuple[int, int] = (10, 100)
    share: float = 0.3
    layers: tuple[int, ...] | None = None
    _distance: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # layer: (h,)
    _waad: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # layer: (h, responses)
    _fai: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # layer: (h, m)

    def __call__(self, site: Site) -> None:
        if site.cross or (self.layers is not None and site.layer not in self.layers):
            return
        b, _, n, m = site.shape
        if b != 1 or n != m:
            raise ValueError(f"this call has {b} rows, {n} queries and {m} keys, must be one whole text")
        wanted = torch.zeros(n, dtype=torch.bool)
        wanted[self.response] = True
        distances, looks, total, count = [], [], torch.zeros(()), torch.zeros(())
        for rows in site.pieces():
            keep = wanted[rows].to(site.query.device)
            weights = site.weights(rows)[0][:, keep].float()
            queries = site.query_positions(rows)[keep]
            distances.append(attention_distance(weights, queries=queries))
            looks.append(waad(weights, queries=queries, window=self.window))
            more, times = future_sums(weights, queries=queries, horizon=self.horizon)
            total, count = total.to(more) + more, count.to(times) + times
        self._distance[site.layer] = torch.cat(distances, -1).mean(-1)
        self._waad[site.layer] = torch.cat(looks, -1)
        self._fai[site.layer] = total / count.clamp(min=1)

    def head_distance(self) -> Float[Tensor, "layers h"]:
        """The mean distance that each head looks back."""
        return torch.stack([self._distance[layer] for layer in sorted(self._distance)])

    def waad(self) -> Float[Tensor, " responses"]:
        """WAAD of each token of the response, the mean over the local heads."""
        local, _ = split_local_global_heads(self.head_distance(), share=self.share)
        return torch.stack([self._waad[layer] for layer in sorted(self._waad)])[local].mean(0)

    def fai(self) -> Float[Tensor, " m"]:
        """FAI of every token, the mean over the global heads."""
        _, far = split_local_global_heads(self.head_distance(), share=self.share)
        return torch.stack([self._fai[layer] for layer in sorted(self._fai)])[far].mean(0)


@register("rhythm-credit", kind="inspect", paper="preplan-anchor", tags=("credit",))
def rhythm_credit(
    waad: Float[Tensor, " t"],
    fai: Float[Tensor, " t"],
    *,
    kind: str = "coupled",
    top: float = 0.4,
    amplification: float = 1.5,
    share: float = 0.5,
    reach: int = 3,
) -> Float[Tensor, " t"]:
    """Factors for the advantages of a response's tokens in policy optimisation.

        delta_t = |WAAD_t - WAAD_{t+1}|;  T = the `top` share of delta ("local") or of FAI (else)
        gamma_t = 1 + (amplification - 1) [t in T]
        "coupled": anchors with a WAAD of at most the median and one of the `reach` deltas before them in the
        top share are dominated by the token before them with the largest delta: that one gets `share` of
        the raise and the anchor keeps the rest

    The last token has delta 0. Thresholds of "coupled" are ours.
    """
    if kind not in ("local", "global", "coupled"):
        raise ValueError(f"kind is {kind!r}, must be 'local', 'global' or 'coupled'")
    count = max(1, round(top * len(waad)))
    delta = torch.cat([(waad[:-1] - waad[1:]).abs(), waad.new_zeros(1)])
    chosen = (delta if kind == "local" else fai).topk(count).indices
    raised = torch.zeros_like(waad)
    raised[chosen] = 1.0
    if kind == "coupled":
        steep, low = delta.topk(count).values[-1], waad.median()
        for t in chosen.tolist():
            before = delta[max(0, t - reach) : t]
            if len(before) and waad[t] <= low and before.max() >= steep:
                raised[t] -= share
                raised[max(0, t - reach) + int(before.argmax())] += share
    return 1 + (amplification - 1) * raised
