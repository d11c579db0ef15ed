"""Whole layers of an encoder left out."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.checks import check_positive
from heedful.convert.attention import ConvertedAttention
from heedful.convert.experts import ExpertLayer, layer_cost
from heedful.convert.importance import changed_outcome
from heedful.convert.model import KEY, parameters
from heedful.convert.report import Change, Cost, Report
from heedful.convert.sites import ENCODERS, find_sites
from heedful.registry import register


@torch.no_grad()
def layer_importance(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]
) -> Float[Tensor, " layers"]:
    """What a model loses with each layer, in the measures of `head_importance`. Source: ours.

    model    of the BERT kind, its layers as they were or converted
    batches  what it takes; padding does not count

    Raises ValueError for another model, or without batches.
    """
    layers = _layers(model)
    if not batches:
        raise ValueError("batches is empty, must hold at least one batch")
    lost = []
    for layer in layers:
        # A layer that gives back what it was given is as good as none.
        lost.append(changed_outcome(model, batches, layer, lambda module, given, out: given[0]))
    return torch.tensor(lost)


@register("prune-layers", kind="convert", paper="shrp", tags=("layer", "pruning", "surgery"))
def prune_layers(
    model: PreTrainedModel, keep: Sequence[int], *, copy: bool = True, context: int = 1024
) -> tuple[PreTrainedModel, Report]:
    """An encoder that has only the layers that are named, in their order.

    model    of the BERT kind (bert, electra, roberta, xlm-roberta), its layers as they were or converted
    keep     numbers of the layers, at least one; e.g. the best ones by `layer_importance`
    copy     False changes the model itself
    context  tokens that a token sees in the report's multiply-adds

    To keep all layers changes nothing. The rows of the report are whole layers.
    Raises ValueError for another model, and for layers that are not there. Source: SHRP, arXiv 2512.20635.
    """
    check_positive("context", context)
    count = len(_layers(model))
    kept = sorted(set(keep))
    if not kept or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(f"keep is {list(keep)}, must name some of the layers 0 to {count - 1}")
    changed = copying.deepcopy(model) if copy else model
    before = parameters(changed)
    layers = _layers(changed)
    names = {module: name for name, module in changed.named_modules()}
    left_out = Cost("left out", 0, 0, 0)
    changes = [
        Change(names[layer], _cost(changed, layer, number, context), left_out)
        for number, layer in enumerate(layers)
        if number not in kept
    ]
    encoder: Any = changed.base_model.encoder
    encoder.layer = nn.ModuleList(layers[number] for number in kept)
    for place, layer in enumerate(encoder.layer):
        if isinstance(layer, ExpertLayer):
            layer.layer = place
        else:
            layer.attention.self.layer_idx = place
    changed.config.num_hidden_layers = len(kept)
    if specs := getattr(changed.config, KEY, None):
        places = {str(number): str(place) for place, number in enumerate(kept)}
        setattr(changed.config, KEY, {places[n]: spec for n, spec in specs.items() if n in places})
    what = f"{len(kept)} of {count} layers"
    return changed, Report(what, tuple(changes), (before, parameters(changed)), context)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    find_sites(model, ENCODERS)  # checks the kind
    if model.config.is_decoder:
        raise ValueError("model is a decoder, must be an encoder")
    encoder: Any = model.base_model.encoder
    return list(encoder.layer)


def _cost(model: PreTrainedModel, layer: Any, number: int, context: int) -> Cost:
    if isinstance(layer, ExpertLayer):
        return layer.cost(context)
    attention = layer.attention.self
    if isinstance(attention, ConvertedAttention):
        return layer_cost(attention.what, attention.multiply_adds(context), layer)
    site = next(site for site in find_sites(model, ENCODERS) if site.layer == number)
    return layer_cost(f"{site.heads} heads", site.cost(context).multiply_adds, layer)
