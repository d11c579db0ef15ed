"""Large kernel attention, VAN's block and model."""

from __future__ import annotations

from typing import Any

from torch import nn

from heedful import authors
from heedful.authors.van_lka import TABLES
from heedful.mixers.grid.van_lka import LargeKernelAttention
from heedful.models.metaformer_poolformer import MetaFormerBlock
from heedful.models.van_lka import VAN, VANAttention, VANMlp
from tests.parity.harness import Tensors, adapter


@adapter("van-lka")
def lka(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = LargeKernelAttention(config["dim"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("van-lka-block")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim = config["dim"]
    made = MetaFormerBlock(
        dim,
        VANAttention(dim),
        VANMlp(dim, int(dim * config["mlp_ratio"])),
        norm=nn.BatchNorm2d,
        layer_scale=1e-2,
    )
    made.load_state_dict(TABLES["Block"].apply(params), strict=True)
    return {"y": made.eval()(inputs["x"])}


@adapter("van-lka-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = VAN(
        classes=config["num_classes"],
        depths=config["depths"],
        dims=config["embed_dims"],
        mlp_ratios=config["mlp_ratios"],
        norm_eps=1e-5,
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
