"""Heads that matter little, left out of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from heedful.convert.attention import HeadsAttention
from heedful.convert.model import convert
from heedful.convert.report import Report
from heedful.convert.sites import Site, by_head, choose_sites
from heedful.registry import register


@register("prune-heads", kind="convert", paper="shrp", tags=("heads", "pruning", "surgery"))
def prune_heads(
    model: PreTrainedModel,
    keep: Mapping[int, Sequence[int]],
    *,
    copy: bool = True,
    context: int = 1024,
) -> tuple[PreTrainedModel, Report]:
    """A model that has, in some layers, only the query heads that are named.

    A head that is left out gives nothing to the output projection, as if its output were zero; key and value
    heads that nobody reads any more go with it. Layers that `keep` does not name stay as they are.

    model    of the Llama kind (llama, mistral, qwen2, qwen3) or of the BERT kind
    keep     of each layer the heads to keep, at least one; `heads_by_importance` gives them
    copy     False changes the model itself
    context  tokens that a token sees in the report's multiply-adds

    To keep all heads changes nothing. Raises ValueError for another model, and for layers or heads that are
    not there. Source: SHRP, arXiv 2512.20635; the rule by importance is ours.
    """
    sites = {site.layer: site for site in choose_sites(model, [*keep] or None)}
    if not keep:
        raise ValueError("keep is empty, must name at least one layer")
    for layer, heads in keep.items():
        count = sites[layer].heads
        if not heads or min(heads) < 0 or max(heads) >= count or len(set(heads)) < len(heads):
            raise ValueError(
                f"keep has {list(heads)} in layer {layer}, must name some of the heads 0 to {count - 1}"
            )

    def make(site: Site) -> HeadsAttention:
        return _kept(site, sorted(keep[site.layer]))

    share = sum(map(len, keep.values())) / sum(sites[layer].heads for layer in keep)
    return convert(model, f"{share:.0%} of the heads", make, layers=[*keep], copy=copy, context=context)


def heads_by_importance(
    importance: Float[Tensor, "layers heads"], share: float, *, evenly: bool = False
) -> dict[int, list[int]]:
    """The heads of a model to keep: the most important ones, at least one in each layer.

    importance  from `head_importance`, or any other measure
    share       of all heads, above 0 and at most 1, rounded up
    evenly      the same share in every layer; else the layers may differ

    Raises ValueError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, must be above 0 and at most 1")
    layers, heads = importance.shape
    if evenly:
        count = -int(-share * heads // 1)
        top = importance.topk(count, dim=1).indices
        return {layer: sorted(row.tolist()) for layer, row in enumerate(top)}
    count = max(layers, -int(-share * layers * heads // 1))
    best = importance.argmax(1)
    first = importance.clone().float()
    first[torch.arange(layers), best] = torch.inf  # every layer keeps one
    flat = first.flatten().topk(count).indices
    return {
        layer: sorted(int(i) % heads for i in flat if int(i) // heads == layer) for layer in range(layers)
    }


def _kept(site: Site, heads: list[int]) -> HeadsAttention:
    d, per = site.head_dim, site.heads // site.kv_heads
    read = sorted({h // per for h in heads})
    kv_map = [read.index(h // per) for h in heads]
    new = HeadsAttention(site, key_map=kv_map, value_map=kv_map)
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for linear, rows in ((site.query, heads), (site.key, read), (site.value, read)):
        weights.append(by_head(linear.weight, d)[rows])
        biases.append(None if linear.bias is None else by_head(linear.bias, d)[rows])
    out = site.out.weight.unflatten(1, (-1, d))[:, heads]
    return new.fill([*weights, out], [*biases, site.out.bias])
