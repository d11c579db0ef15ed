"""Superlinear attention: anchors, spans, scores and the mixture of span outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.mixers.packed import Packing
from heedful.mixers.sparse.superlinear import superlinear_attention
from heedful.routing.jump_search import jump_distances, jump_search, jump_spans
from tests.parity.harness import Tensors, adapter


@adapter("superlinear")
def superlinear(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    length = inputs["k"].shape[2]
    outputs = {}
    for name, told in config.items():
        window_index, spans, power = told["sw_index"], told["topk"], told.get("inv_search_power_int", 2)
        options = {"window_index": window_index, "power": power}
        for suffix, mask in (("", None), ("_pad", inputs["attention_mask"].bool())):
            packing = Packing.of(inputs["k"][:, 0, :, 0], mask)
            search, query, key, value = (packing.put(inputs[x]) for x in ("q_search", "q", "k", "v"))
            anchor, score = jump_search(search, key, spans=spans, **options)
            first, last = jump_spans(anchor, **options)
            outputs[f"{name}{suffix}.values"] = _spread(packing, score, -torch.inf)
            start = torch.zeros(2, dtype=torch.int64) if mask is None else mask.long().argmax(1)
            start = start[:, None, None, None]
            # Without an anchor the authors' span begins before the sequence and ends at -1.
            tokens = (torch.arange(length)[:, None] + 1 - start).clamp(min=0)
            none = -1 - (2 * tokens.double().sqrt()).ceil().long()
            empty = _spread(packing, last, -1) < 0
            begin = torch.where(empty, none, _spread(packing, first, 0) + start)
            outputs[f"{name}{suffix}.qstart"] = begin
            outputs[f"{name}{suffix}.qend"] = torch.where(empty, -1, _spread(packing, last, -1) + start)
            if power == 2:
                y = superlinear_attention(search, query, key, value, spans=spans, **options)
                outputs[f"{name}{suffix}.y"] = packing.take(y)
    rows = torch.arange(length)[:, None]
    stripes = torch.zeros(length, length, dtype=torch.bool)
    for reach in jump_distances(length, window_index=config["sw2"]["sw_index"]):
        stripes |= rows - torch.arange(length) == reach
    return outputs | {"search_mask_sw2": stripes[None, None]}


def _spread(packing: Packing, x: Tensor, missing: float) -> Tensor:
    """Back to the tokens, with `missing` where there is padding."""
    if packing.place is None:
        return x
    return packing.take(x).masked_fill(packing.place[:, None, :, None] < 0, missing)
