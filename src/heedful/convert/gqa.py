"""Multi-head attention made grouped-query attention, by the means of heads that are neighbours or alike."""

from __future__ import annotations

import copy as copying
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.checks import check_choice, check_divides, check_positive
from heedful.convert.attention import HeadsAttention
from heedful.convert.model import KEY, convert, parameters
from heedful.convert.report import Change, Report
from heedful.convert.sites import ENCODERS, Site, by_head, choose_sites, linear_of
from heedful.registry import register

Heads = TypeVar("Heads", bound=HeadsAttention)
GROUPINGS = ("neighbours", "similarity")


@register("to-gqa", kind="convert", paper="gqa", tags=("heads", "grouped-query", "surgery"))
def to_gqa(
    model: PreTrainedModel,
    *,
    kv_heads: int,
    grouping: str = "neighbours",
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """A model with fewer key and value heads, each the mean of a group of those it had.

        W_k,j = mean over i in group j of W_k,i,  W_v alike; query heads read the head of their group

    model     of the Llama kind (llama, mistral, qwen2, qwen3), which stays one that plain transformers loads,
              or of the BERT kind
    kv_heads  heads to keep, a divisor of those there are
    grouping  "neighbours": runs of heads, as published; "similarity": groups of equal size whose heads have
              the nearest weights (`group_heads`); query heads are put in order along with them
    copy      False changes the model itself
    context   tokens that a token sees in the report's multiply-adds

    Heads of a group that are equal change nothing. Raises ValueError for another model, one that is converted
    already, or heads that do not divide. Source: GQA, arXiv 2305.13245; the grouping by similarity is ours.
    """
    check_positive("kv_heads", kv_heads)
    check_choice("grouping", grouping, GROUPINGS)
    check_positive("context", context)
    sites = choose_sites(model, None)
    for site in sites:
        check_divides("kv_heads", kv_heads, "the key and value heads of the model", site.kv_heads)
    if getattr(model.config, KEY, None):
        raise ValueError("model has converted attention, must have its own in every layer")
    what = f"{kv_heads} key and value heads"
    if model.config.model_type in ENCODERS:
        return convert(
            model,
            what,
            lambda site: _shared(site, groups_of(site, kv_heads, grouping)),
            layers=None,
            copy=copy,
            context=context,
        )
    changed = copying.deepcopy(model) if copy else model
    count = parameters(changed)
    pairs = [
        (site, _grouped(site, groups_of(site, kv_heads, grouping))) for site in choose_sites(changed, None)
    ]
    costs = [site.cost(context) for site, _ in pairs]
    for site, new in pairs:
        for name, linear in new.items():
            setattr(site.module, name, linear)
        site.module.num_key_value_groups = site.heads // kv_heads
    changed.config.num_key_value_heads = kv_heads
    after = [site.cost(context) for site in choose_sites(changed, None)]
    changes = [Change(s.name, b, a) for (s, _), b, a in zip(pairs, costs, after, strict=True)]
    return changed, Report(what, tuple(changes), (count, parameters(changed)), context)


def groups_of(site: Site, kv_heads: int, grouping: str) -> list[list[int]]:
    """The key and value heads of a site in groups of equal size."""
    size = site.kv_heads // kv_heads
    if grouping == "neighbours":
        return [list(range(i, i + size)) for i in range(0, site.kv_heads, size)]
    return group_heads(head_similarity(site), size)


def head_similarity(site: Site) -> Float[Tensor, "h h"]:
    """Of each pair of key and value heads, the mean cosine of their key and of their value weights."""
    each = []
    for linear in (site.key, site.value):
        rows = by_head(linear.weight.detach().double(), site.head_dim).flatten(1)
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        each.append(rows @ rows.T)
    return (each[0] + each[1]) / 2


def group_heads(similarity: Float[Tensor, "h h"], size: int) -> list[list[int]]:
    """Groups of equal size with a high similarity inside.

    Each group grows from the most similar pair that is left; then heads change places between groups as long
    as that raises the similarity inside. Groups and their heads are in ascending order.
    """
    check_divides("size", size, "the number of heads", len(similarity))
    if size == 1:
        return [[h] for h in range(len(similarity))]
    s = similarity.double().clone().fill_diagonal_(0)
    left, groups = list(range(len(s))), []
    while left:
        group = _best_pair(s, left)
        left = [h for h in left if h not in group]
        while len(group) < size:
            head = left[int(s[left][:, group].sum(1).argmax())]
            group.append(head)
            left.remove(head)
        groups.append(group)
    while _swap(s, groups):
        pass
    return sorted(sorted(group) for group in groups)


def _best_pair(s: Tensor, left: list[int]) -> list[int]:
    inside = s[left][:, left].clone().fill_diagonal_(-torch.inf)
    first, second = divmod(int(inside.argmax()), len(left))
    return [left[first], left[second]]


def _swap(s: Tensor, groups: list[list[int]]) -> bool:
    """Exchange the first two heads of different groups that gain by it."""
    for a, one in enumerate(groups):
        for other in groups[a + 1 :]:
            for i, x in enumerate(one):
                for j, y in enumerate(other):
                    rest, others = [h for h in one if h != x], [h for h in other if h != y]
                    gain = (s[y, rest] - s[x, rest]).sum() + (s[x, others] - s[y, others]).sum()
                    if gain > 1e-12:
                        one[i], other[j] = y, x
                        return True
    return False


def mean_heads(rows: Float[Tensor, "h d *c"], groups: list[list[int]]) -> Float[Tensor, "g d *c"]:
    """The mean of each group of heads."""
    return torch.stack([rows[group].mean(0) for group in groups])


@torch.no_grad()
def _grouped(site: Site, groups: list[list[int]]) -> dict[str, nn.Linear]:
    """New projections: key and value heads are means; query heads stand in the order of the groups."""
    d = site.head_dim
    per = site.heads // site.kv_heads
    order = torch.tensor([h * per + i for group in groups for h in group for i in range(per)])
    order = order.to(site.query.weight.device)

    def ordered(rows: Tensor) -> Tensor:
        return by_head(rows, d)[order].flatten(0, 1)

    def pooled(rows: Tensor) -> Tensor:
        return mean_heads(by_head(rows, d), groups).flatten(0, 1)

    def each(linear: nn.Linear, change: Any) -> nn.Linear:
        bias = None if linear.bias is None else change(linear.bias)
        return linear_of(change(linear.weight), bias, like=linear)

    out = ordered(site.out.weight.T).T
    return {
        "q_proj": each(site.query, ordered),
        "k_proj": each(site.key, pooled),
        "v_proj": each(site.value, pooled),
        "o_proj": linear_of(out, site.out.bias, like=site.out),
    }


@torch.no_grad()
def _shared(site: Site, groups: list[list[int]]) -> HeadsAttention:
    """The same where transformers has no form of its own: query heads stay, and a map says what they read."""
    kv_map = [next(g for g, group in enumerate(groups) if h in group) for h in range(site.kv_heads)]
    return merged(site, kv_map, kv_map)


@torch.no_grad()
def merged(
    site: Site,
    key_group: list[int],
    value_group: list[int],
    kind: type[Heads] = HeadsAttention,  # type: ignore[assignment]
    **numbers: Any,
) -> Heads:
    """Attention whose key heads, and value heads, are the means of groups of those of a site.

    key_group, value_group  of each key and value head the group: 0, 1, ... with none left out
    """
    per = site.heads // site.kv_heads
    new = kind(
        site,
        key_map=[key_group[h // per] for h in range(site.heads)],
        value_map=[value_group[h // per] for h in range(site.heads)],
        **numbers,
    )
    d = site.head_dim
    weights: list[Tensor] = [by_head(site.query.weight, d)]
    biases: list[Tensor | None] = [site.query.bias]
    for linear, group in ((site.key, key_group), (site.value, value_group)):
        groups = [[h for h, g in enumerate(group) if g == j] for j in range(max(group) + 1)]
        weights.append(mean_heads(by_head(linear.weight, d), groups))
        biases.append(None if linear.bias is None else mean_heads(by_head(linear.bias, d), groups))
    out = site.out.weight.unflatten(1, (-1, d))
    return new.fill([*weights, out], [*biases, site.out.bias])
