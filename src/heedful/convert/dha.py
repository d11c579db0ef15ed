"""Multi-head attention made decoupled-head attention: search of groups, gradual fusion, merging."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from heedful.checks import check_positive
from heedful.convert.dha_fusion import fuse_heads, fusion_loss, lagrangian
from heedful.convert.distill import auxiliary, cross_entropy, distillation_loss, hidden_loss, train
from heedful.convert.gqa import merged
from heedful.convert.model import convert
from heedful.convert.report import Report
from heedful.convert.sites import Site, by_head, choose_sites
from heedful.registry import register

HOLD = 0.7  # share of the steps in which the target falls to 0; after them the ratios come to rest


@dataclass(frozen=True)
class HeadGroups:
    """Of each key head, and of each value head, of a layer its group: 0, 1, ... with none left out."""

    key: list[int]
    value: list[int]


@torch.no_grad()
def search_groups(
    model: PreTrainedModel,
    *,
    budget: float,
    batches: Sequence[Mapping[str, Any]] = (),
    layers: Sequence[int] | None = None,
) -> dict[int, HeadGroups]:
    """Which key heads, and which value heads, of each layer are to become one.

    All heads start alone. Of all pairs of groups, of keys or of values, in any layer, the two are joined
    whose joining costs least,

        |A| |B| / (|A| + |B|) |mean_A - mean_B|^2 / sum over the heads of |W|^2

    until the heads left are the budget. Layers, and keys and values, thus end with numbers of their own.

    budget   share of key and value heads to keep, over all layers; each layer keeps one of each at least
    batches  what the model takes: distances are then those of what the heads give for the inputs that the
             layers see (padding included), else of their weights

    Raises ValueError for another model or budget. Source: DHA, arXiv 2406.06567; the procedure is ours.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget}, must be above 0 and at most 1")
    sites = choose_sites(model, layers)
    roots = _input_roots(model, sites, batches) if batches else {}
    sides = []
    for site in sites:
        for linear in (site.key, site.value):
            rows = by_head(linear.weight.double(), site.head_dim)
            if batches:
                rows = rows @ roots[site]
            sides.append(_Side(rows.flatten(1) / rows.norm().clamp(min=1e-30)))
    wanted = max(len(sides), round(budget * sum(len(side.groups) for side in sides)))
    while sum(len(side.groups) for side in sides) > wanted:
        min(sides, key=lambda side: side.cheapest[0]).join()
    return {
        site.layer: HeadGroups(key.labels(), value.labels())
        for site, key, value in zip(sites, sides[::2], sides[1::2], strict=True)
    }


@register("to-dha", kind="convert", paper="dha", tags=("heads", "grouped-query", "surgery"))
def to_dha(
    model: PreTrainedModel,
    groups: Mapping[int, HeadGroups],
    *,
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """A model whose key heads are merged in one way, and whose value heads in another.

    Each group becomes the mean of its heads, and query heads read the heads of their groups. After
    `fuse_gradually` the heads of a group are alike and nothing is lost; without it this is a start for
    `recover`.

    model    of the Llama kind (llama, mistral, qwen2, qwen3) or of the BERT kind
    groups   of each layer to convert, from `search_groups`
    copy     False changes the model itself
    context  tokens that a token sees in the report's multiply-adds

    The cache of a layer holds its key heads and its value heads; a static cache of transformers serves only
    where these are as many. Groups of one head each change nothing.
    Raises ValueError for another model and for groups that do not fit. Source: DHA, arXiv 2406.06567.
    """
    _checked(model, groups)

    def make(site: Site) -> Any:
        return merged(site, groups[site.layer].key, groups[site.layer].value)

    left = sum(max(g.key) + max(g.value) + 2 for g in groups.values())
    what = f"{left} of {sum(len(g.key) * 2 for g in groups.values())} key and value heads"
    return convert(model, what, make, layers=[*groups], copy=copy, context=context)


def fuse_gradually(
    model: PreTrainedModel,
    groups: Mapping[int, HeadGroups],
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int = 200,
    lr: float = 1e-4,
    ratio_lr: float = 2e-2,
    multiplier_lr: float = 0.5,
    distil: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a model, in place, until the key heads and the value heads of each group are alike.

        W~_i = sum_m ratios_im W_m over the heads m of the group of i, ratios the identity at first
        loss = loss of the model + linear (L - t) + square / 2 (L - t)^2

    L is the fusion loss (`fusion_loss`) beside the squared size of the heads, as a share of what it was at
    first, in the mean over all projections;
    its target t falls from 1 to 0 over the first 7 of 10 steps, and the two multipliers climb from 0 and 50.
    Before the first step the model computes what it did, and it keeps its form; `to_dha` then merges.

    batches        what the model takes, one after the other and again
    lr, ratio_lr, multiplier_lr  of the model, of the ratios, and of the multipliers
    distil         the loss of the model is the distance to itself as it was; so it is for models without
                   logits. Else the cross-entropy of the next token
    progress       show it

    Gives the loss and L ("fusion") of every step. Raises ValueError as `to_dha` does, without batches, and
    where every group has one head. Source: DHA, arXiv 2406.06567; the formulas are ours.
    """
    check_positive("steps", steps)
    if not batches:
        raise ValueError("batches is empty, must hold at least one batch")
    sites = _checked(model, groups)
    sides = [
        (linear, torch.tensor(group, device=linear.weight.device), site.head_dim)
        for site in sites
        for linear, group in ((site.key, groups[site.layer].key), (site.value, groups[site.layer].value))
        if max(group) + 1 < len(group)
    ]
    first = [_apart(*side).item() for side in sides]
    sides = [side for side, loss in zip(sides, first, strict=True) if loss > 0]
    first = [loss for loss in first if loss > 0]
    if not sides:
        raise ValueError("groups has groups of one head or of equal heads alone, must have some to fuse")
    teacher = copying.deepcopy(model).eval() if distil or model.get_output_embeddings() is None else None
    own = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    ratios = []
    for projection, group, head_dim in sides:
        fusion = _Fusion(group, head_dim, projection.weight)
        ratios.append(fusion.ratios)
        parametrize.register_parametrization(projection, "weight", fusion)
        if projection.bias is not None:
            parametrize.register_parametrization(projection, "bias", fusion)
    linear, square = (torch.tensor(start, device=own[0].device, requires_grad=True) for start in (0.0, 50.0))
    share = 1.0

    def loss(step: int) -> Tensor:
        nonlocal share
        target = max(0.0, 1 - (step + 1) / (HOLD * steps))
        apart = torch.stack([_apart(*side) / start for side, start in zip(sides, first, strict=True)]).mean()
        share = apart.item()
        return _model_loss(model, teacher, batches[step % len(batches)]) + lagrangian(
            apart, target, linear, square
        )

    try:
        model.train()
        return train(
            [
                {"params": own, "lr": lr},
                {"params": ratios, "lr": ratio_lr, "hold": HOLD},
                {"params": [linear, square], "lr": multiplier_lr, "maximize": True, "hold": 1.0},
            ],
            loss,
            steps=steps,
            progress=progress,
            also=lambda: {"fusion": share},
        )
    finally:  # the fused weights stay, the ratios go
        for projection, _, _ in sides:
            for name in ("weight", "bias"):
                if parametrize.is_parametrized(projection, name):
                    parametrize.remove_parametrizations(projection, name)
        model.train(training)


class _Fusion(nn.Module):
    """Weights, or biases, of heads combined within their groups."""

    def __init__(self, group: Tensor, head_dim: int, like: Tensor) -> None:
        super().__init__()
        self.group, self.head_dim = group, head_dim
        self.ratios = nn.Parameter(torch.eye(len(group), dtype=like.dtype, device=like.device))

    def forward(self, rows: Tensor) -> Tensor:
        heads = by_head(rows, self.head_dim)
        fused = fuse_heads(heads if rows.ndim == 2 else heads[..., None], self.ratios, self.group)
        return fused.reshape(rows.shape)


class _Side:
    """The key heads, or the value heads, of a layer on their way into groups."""

    def __init__(self, rows: Float[Tensor, "h w"]) -> None:
        self.rows = rows
        self.groups = [[h] for h in range(len(rows))]
        self._find()

    def _find(self) -> None:
        self.cheapest: tuple[float, int, int] = (float("inf"), 0, 0)
        if len(self.groups) > 1:
            mean = torch.stack([self.rows[group].mean(0) for group in self.groups])
            size = torch.tensor([float(len(group)) for group in self.groups], device=mean.device)
            weight = size[:, None] * size / (size[:, None] + size)
            cost = (weight * torch.cdist(mean, mean).square()).fill_diagonal_(torch.inf)
            a, b = divmod(int(cost.argmin()), len(cost))
            self.cheapest = (cost[a, b].item(), min(a, b), max(a, b))

    def join(self) -> None:
        _, a, b = self.cheapest
        self.groups[a] = self.groups[a] + self.groups.pop(b)
        self._find()

    def labels(self) -> list[int]:
        ordered = sorted(sorted(group) for group in self.groups)
        return [next(g for g, group in enumerate(ordered) if h in group) for h in range(len(self.rows))]


def _input_roots(
    model: PreTrainedModel, sites: list[Site], batches: Sequence[Mapping[str, Any]]
) -> dict[Site, Float[Tensor, "c c"]]:
    """Of each layer R with R R^T = sum of x x^T over its inputs, so that |W R| is the size of all W x."""
    moments: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> None:
        x = x.flatten(0, 1).double()
        moments[site] = moments.get(site, 0) + x.T @ x

    hooks = [
        site.key.register_forward_pre_hook(lambda _, given, site=site: keep(site, given[0])) for site in sites
    ]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    roots = {}
    for site, moment in moments.items():
        values, vectors = torch.linalg.eigh(moment)
        roots[site] = vectors * values.clamp(min=0).sqrt()
    return roots


def _checked(model: PreTrainedModel, groups: Mapping[int, HeadGroups]) -> list[Site]:
    if not groups:
        raise ValueError("groups is empty, must name at least one layer")
    sites = choose_sites(model, [*groups])
    for site in sites:
        for name in ("key", "value"):
            given = getattr(groups[site.layer], name)
            if len(given) != site.kv_heads or set(given) != set(range(max(given) + 1)):
                raise ValueError(
                    f"groups has {given} as {name} of layer {site.layer}, must hold for each of "
                    f"{site.kv_heads} heads a group: 0, 1, ... with none left out"
                )
    return sites


def _apart(linear: nn.Linear, group: Tensor, head_dim: int) -> Tensor:
    """The fusion loss of a projection, its bias included, beside the size of the heads: else small heads
    would do for equal ones."""
    rows = by_head(linear.weight, head_dim)
    if linear.bias is not None:
        rows = torch.cat([rows, by_head(linear.bias, head_dim)[..., None]], dim=-1)
    size = torch.bincount(group)[group].to(rows.dtype)
    return fusion_loss(rows, group) / (size * rows.square().sum((1, 2))).sum()


def _model_loss(model: PreTrainedModel, teacher: PreTrainedModel | None, batch: Mapping[str, Any]) -> Tensor:
    given = {name: value for name, value in batch.items() if name != "labels"}
    out = model(**given)
    if teacher is None:
        loss = cross_entropy(out["logits"], batch)
    else:
        with torch.no_grad():
            wanted = teacher(**given)
        if "logits" in out:
            loss = distillation_loss(out["logits"], wanted["logits"])
        else:
            loss = hidden_loss(
                out["last_hidden_state"], wanted["last_hidden_state"], given.get("attention_mask")
            )
    return loss + sum(auxiliary(model))
