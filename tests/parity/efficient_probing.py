"""Efficient probing and the attentive poolings that its paper compares."""

from __future__ import annotations

from typing import Any

from heedful.mixers.pooling.abmilp import ABMILP
from heedful.mixers.pooling.aim_pool import AIMPool
from heedful.mixers.pooling.cae_pool import CAEPool
from heedful.mixers.pooling.cait_pool import CaiTPool
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
