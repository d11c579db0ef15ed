"""Efficient probing and the attentive poolings that its paper compares."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from heedful.mixers.pooling.abmilp import ABMILP
from heedful.mixers.pooling.aim_pool import AIMPool
from heedful.mixers.pooling.cae_pool import CAEPool
from heedful.mixers.pooling.cait_pool import CaiTPool
from heedful.mixers.pooling.cbam_pool import CBAMPool
from heedful.mixers.pooling.clip_pool import CLIPPool
from heedful.mixers.pooling.coca_pool import CoCaPool
from heedful.mixers.pooling.dolg_pool import DOLGPool
from heedful.mixers.pooling.efficient_probing import EfficientProbing
from heedful.mixers.pooling.esimpool import ESimPool
from heedful.mixers.pooling.siglip_pool import SigLIPPool
from heedful.mixers.pooling.simpool import SimPool
from heedful.mixers.pooling.vjepa_pool import VJEPAPool
from tests.parity.harness import Tensors, adapter


@adapter("efficient-probing", "efficient-probing-dout2")
def efficient_probing(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = EfficientProbing(
        config["dim"],
        queries=config["num_queries"],
        d_out=config["d_out"],
        qkv_bias=config.get("qkv_bias", False),
    )
    pool.load_state_dict(params, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-simpool")
def simpool(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = SimPool(config["dim"], heads=config["num_heads"])
    pool.load_state_dict(params, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-aim")
def aim(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = AIMPool(config["dim"], heads=config["num_heads"])
    pool.load_state_dict(params, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-cae")
def cae(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = CAEPool(config["dim"], heads=config["num_heads"])
    # The authors' block holds a norm2_cross that its forward never calls.
    named = {k.removeprefix("cross_attn."): v for k, v in params.items() if not k.startswith("norm2_cross")}
    pool.load_state_dict(named, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-vjepa")
def vjepa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = VJEPAPool(config["embed_dim"], heads=config["num_heads"])
    named = {k.removeprefix("cross_attention_block.").removeprefix("xattn."): v for k, v in params.items()}
    pool.load_state_dict(named, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-cait")
def cait(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = CaiTPool(config["embed_dim"], heads=config["num_heads"])
    named = {k.removeprefix("blocks_token_only.0.").removeprefix("attn."): v for k, v in params.items()}
    pool.load_state_dict(named, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-abmilp")
def abmilp(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = ABMILP(config["dim"])
    pool.load_state_dict({k.removeprefix("self_attn."): v for k, v in params.items()}, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-esimpool")
def esimpool(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = ESimPool(config["dim"], heads=config["num_heads"])
    pool.load_state_dict(params, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-siglip")
def siglip(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = SigLIPPool(config["in_features"], heads=config["num_heads"])
    pool.load_state_dict(params, strict=True)
    return {"y": pool.eval()(inputs["x"])}


def _square(x: Tensor) -> Tensor:
    """Tokens (b, n, c) as a square map, row by row."""
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).unflatten(2, (side, side))


@adapter("pool-coca")
def coca(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = CoCaPool(config["dim"], heads=config["heads"], head_dim=config["dim_head"])
    named = {
        "query_token": params["img_queries"][None, :1],  # the answers to the others are not used
        "norm.weight": params["norm.gamma"],
        "norm.bias": params["norm.beta"],
        "q.weight": params["to_q.weight"],
        "kv.weight": params["to_kv.weight"],
        "proj.weight": params["to_out.weight"],
    }
    pool.load_state_dict(named, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-dolg")
def dolg(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = DOLGPool(config["in_c"], out=config["s3_dim"])
    named = {k: v.flatten(1) if v.ndim == 4 else v for k, v in params.items()}
    pool.load_state_dict(named, strict=True)
    return {"y": pool.eval()(inputs["x"])}


@adapter("pool-clip")
def clip(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = CLIPPool(config["in_features"], heads=config["num_heads"], size=(config["feat_size"],) * 2)
    # The published formula has no norm, but the authors' module holds one.
    pool.load_state_dict({k: v for k, v in params.items() if not k.startswith("norm")}, strict=True)
    return {"y": pool.eval()(_square(inputs["x"]))}


@adapter("pool-cbam")
def cbam(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = CBAMPool(config["channels"], ratio=config["rd_ratio"], kernel=config["spatial_kernel_size"])
    named = {}
    for name, value in params.items():
        name = name.removeprefix("channel.").removeprefix("spatial.conv.")
        named[name] = value.flatten(1) if name.startswith("fc") else value
    named["conv.weight"] = params["spatial.conv.conv.weight"]
    pool.load_state_dict(named, strict=True)
    return {"y": pool.eval()(_square(inputs["x"]))}
