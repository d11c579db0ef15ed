"""Channel group attention of DaViT; the authors' module takes tokens."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.davit import ChannelGroupAttention
from tests.parity.harness import Tensors, adapter


@adapter("davit-channel-attention")
def channel_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = ChannelGroupAttention(config["dim"], heads=config["num_heads"], qkv_bias=config["qkv_bias"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"].mT).mT}
