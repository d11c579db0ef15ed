"""L2ViT: the authors' ReLU linear attention."""

from __future__ import annotations

from typing import Any

from heedful.mixers.linear.l2vit import ReLULinearAttention
from tests.parity.harness import Tensors, adapter


@adapter("l2vit-linear-attention")
def linear_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = ReLULinearAttention(config["dim"], heads=config["num_heads"], qkv_bias=config["qkv_bias"])
    mixer.load_state_dict(params, strict=True)
    x = inputs["x"]
    return {"y": mixer.eval()(x), "denom_unclamped": mixer.denominators(x)}
