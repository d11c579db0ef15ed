"""What each head does: its habits in numbers, and the habit that it is known by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.inspect.distance import token_distances
from heedful.inspect.entropy import attention_entropy
from heedful.inspect.sample import Sample
from heedful.inspect.site import Site
from heedful.registry import register

# Edges of the bins of distance back (left, negative: ahead), in tokens: 0, 1, 2, 3-4, 5-8, ...
_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513)


@dataclass(frozen=True)
class Habit:
    """A way to attend: least share of the attention that makes it a head's habit, and words for it."""

    key: str
    label: str
    words: str
    colour: str
    least: float = 0.0
    times: float = 1.5  # and so many times what uniform attention would give


TEXT = (
    Habit("special", "parked", "rests on special tokens such as [SEP] or the first token", "#8a8f98", 0.5),
    Habit("previous", "previous token", "looks at the token before", "#1f77b4", 0.35),
    Habit("next", "next token", "looks at the token after", "#17a2b8", 0.35),
    Habit("self", "itself", "looks at the token itself", "#9467bd", 0.35),
    Habit("same", "same token", "looks at other places of the same token", "#e377c2", 0.25),
    Habit("near", "neighbours", "looks at the tokens around", "#2ca02c", 0.5),
)
IMAGE = (
    Habit("special", "parked", "rests on the class or register tokens", "#8a8f98", 0.5),
    Habit("self", "itself", "looks at the patch itself", "#9467bd", 0.35),
    Habit("near", "neighbours", "looks at the patches around", "#2ca02c", 0.4),
    Habit("row", "row", "looks along its row of patches", "#1f77b4", 0.4),
    Habit("column", "column", "looks along its column of patches", "#17a2b8", 0.4),
)
KEYED = Habit("alike", "fixed places", "looks at the same few places, whoever asks", "#d95f02", 0.6)
BROAD = Habit("entropy", "broad", "spreads over almost everything", "#bcbd22", 0.85)
CONTENT = Habit("content", "content", "picks by content", "#d62728")


def habits(image: bool) -> tuple[Habit, ...]:
    """All habits that heads are told apart by."""
    return (*(IMAGE if image else TEXT), KEYED, BROAD, CONTENT)


@register("head-profile", kind="inspect", paper="vit-visual-analytics", tags=("heads",))
class HeadProfile:
    """What the heads of self-attention do on one sample, row by row as `see` of `capture`.

    After the model has run, by (layer, module name):
      features  shares of attention in numbers, each (h,): `special` tokens, the token `self`, the `previous`
                and `next` one, the `same` token elsewhere, `near` ones (up to 3 away, for images 1 hop,
                itself not counted), the `row` and `column` of the grid; `distance`, the mean; `entropy` as a
                share of that of uniform attention; `alike`, how alike rows are:
                |mean row|^2 / mean |row|^2, 1 when every query looks at the same places
      chance    the same of uniform attention over what each query may see
      received  (h, m), the mean weight of each token among those who may see it
      lags      (h, bins), the mean mass by distance: by hops on a grid, else in `lag_names()`

    Padding must be masked out by the model; one sample a batch.
    """

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.features: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.chance: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.received: dict[tuple[int, str], Tensor] = {}
        self.lags: dict[tuple[int, str], Tensor] = {}

    def __call__(self, site: Site) -> None:
        b, _, n, m = site.shape
        if site.cross or b != 1 or n != m or m != len(self.sample):
            return
        total: dict[str, Tensor] = {}
        chance: dict[str, Tensor] = {}
        for rows in site.pieces():
            visible = site.visible(rows)[0]
            weights = site.weights(rows)[0].float()
            positions = site.query_positions(rows)
            even = visible.float() / visible.sum(-1, keepdim=True).clamp(min=1)
            _add(total, self._sums(weights, visible, positions))
            _add(chance, self._sums(even, visible, positions))
        place = (site.layer, site.name)
        seen = total.pop("seen").clamp(min=1)
        chance.pop("seen")
        self.received[place] = (total["received"] / seen).cpu()
        self.lags[place] = (total.pop("lags") / n).cpu()
        chance.pop("lags")
        self.features[place], self.chance[place] = (_means(x, n) for x in (total, chance))

    def _sums(
        self, weights: Float[Tensor, "h r m"], visible: Bool[Tensor, "c r m"], queries: Int[Tensor, " r"]
    ) -> dict[str, Tensor]:
        """What adds up over pieces of rows."""
        sample, device = self.sample, weights.device
        m = weights.shape[-1]
        special = sample.special.to(device).clone()
        if sample.grid is None:
            special[0] = True  # the first token serves as one where a model has none
        plain = ~special
        back = token_distances(weights, queries)
        where: dict[str, Tensor] = {"special": special.expand(len(queries), m)}
        if sample.grid is None:
            away = back.abs()
            where |= {"self": back == 0, "previous": back == 1, "next": back == -1}
            where["near"] = (away >= 1) & (away <= 3)
            if sample.ids is not None:
                ids = sample.ids.to(device)
                where["same"] = (ids[queries][:, None] == ids) & (back != 0)
            # A special token counts as that alone, else the ends of short texts look like neighbours.
            where = {k: v if k == "special" else v & plain for k, v in where.items()}
            bins = _bins(back)
            count = len(lag_names(m))
            shift = count // 2
            bins = bins + shift
        else:
            prefix, width = sample.prefix, sample.grid[1]
            row, column = (
                (torch.arange(m, device=device) - prefix) // width,
                (torch.arange(m, device=device) - prefix) % width,
            )
            dy, dx = (x[queries][:, None] - x for x in (row, column))
            patches = plain[queries][:, None] & plain
            away = torch.maximum(dy.abs(), dx.abs())
            where["self"] = back == 0
            where["near"] = (away == 1) & patches
            where["row"] = (dy == 0) & (dx != 0) & patches
            where["column"] = (dx == 0) & (dy != 0) & patches
            count = max(sample.grid)
            bins = away.masked_fill(~patches, count)
            away = away * patches
            count += 1
        out = {key: (weights * mask).sum((-2, -1)) for key, mask in where.items()}
        out["distance"] = (weights * away).sum((-2, -1))
        out["entropy"] = attention_entropy(weights, visible=visible.expand_as(weights)).sum(-1)
        out["received"] = weights.sum(-2)
        out["squares"] = weights.square().sum((-2, -1))
        out["seen"] = visible.sum(-2).float()
        flat = bins.clamp(0, count - 1).flatten()
        lags = weights.new_zeros(weights.shape[0], count)
        out["lags"] = lags.index_add(1, flat, weights.flatten(1))
        return out


def lag_names(m: int) -> list[str]:
    """The bins of distance of a text of m tokens, from far ahead to far back."""
    edges = [e for e in _EDGES if e < max(2, m)]
    names = [f"{a}" if b == a + 1 else f"{a}–{b - 1}" for a, b in zip(edges, (*edges[1:], m), strict=True)]
    return [*(f"+{x}" for x in reversed(names)), "0", *(f"−{x}" for x in names)]


def _bins(back: Int[Tensor, "r m"]) -> Int[Tensor, "r m"]:
    """The number of the bin of each distance, negative ahead; far ones are cut off by the caller."""
    edges = torch.tensor(_EDGES, device=back.device)
    return torch.bucketize(back.abs(), edges, right=True) * back.sign()


def _add(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for key, x in more.items():
        total[key] = total[key] + x if key in total else x


def _means(sums: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    sums = {**sums}
    mean = sums.pop("received") / n
    alike = mean.square().sum(-1) / (sums.pop("squares") / n).clamp(min=1e-12)
    return {**{key: (x / n).cpu() for key, x in sums.items()}, "alike": alike.cpu()}


def habit_of(features: dict[str, float], chance: dict[str, float], *, image: bool = False) -> Habit:
    """The habit a head is known by: of those it has, the one furthest above its least share.

    Fixed places, broad and content are what is left, in this order. The thresholds are ours.
    """
    found: tuple[float, Habit] | None = None
    for habit in IMAGE if image else TEXT:
        value = features.get(habit.key, 0.0)
        if value >= habit.least and value >= habit.times * chance.get(habit.key, 0.0):
            strength = value / habit.least
            if found is None or strength > found[0]:
                found = (strength, habit)
    if found:
        return found[1]
    if features["entropy"] >= BROAD.least:
        return BROAD
    return KEYED if features["alike"] >= KEYED.least else CONTENT
