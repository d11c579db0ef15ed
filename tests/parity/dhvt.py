"""DHVT: head-interacted attention, its MLP with a convolution, and the whole network."""

from __future__ import annotations

import math
from typing import Any

from heedful import authors
from heedful.mixers.heads.dhvt import HeadInteractedAttention
from heedful.models.dhvt import DAFF, DHVT
from tests.parity.harness import Tensors, adapter


@adapter("dhvt-hi-attention")
def attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = HeadInteractedAttention(config["dim"], heads=config["num_heads"], qkv_bias=config["qkv_bias"])
    return {"y": authors.load(mixer, params).eval()(inputs["x"])}


@adapter("dhvt-daff")
def daff(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = DAFF(config["in_features"], config["hidden_features"]).eval()
    made.load_state_dict(params, strict=True)
    side = math.isqrt(inputs["x"].shape[1] - 1)
    return {"y": made(inputs["x"], (side, side))}


@adapter("dhvt-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = DHVT(
        classes=config["num_classes"],
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
