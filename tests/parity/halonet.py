"""HaloNet: the attention layer of timm, plain, strided and averaged."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.halonet import HaloAttention
from tests.parity.harness import Tensors, adapter


@adapter("halonet-attention", "halonet-attention-stride2", "halonet-attention-avgdown")
def halonet(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    named = {"num_heads": "heads", "dim_head": "head_dim"}
    mixer = HaloAttention(**{named.get(name, name): value for name, value in config.items()})
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}
