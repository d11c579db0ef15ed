"""MetaFormer: PoolFormer's mixer and block, the attention of the hybrids, and a hybrid model."""

from __future__ import annotations

from typing import Any

from torch import nn

from heedful import authors
from heedful.mixers.grid.metaformer_attention import MetaFormerAttention
from heedful.mixers.grid.metaformer_poolformer import PoolMixer
from heedful.models.metaformer_poolformer import MetaFormer, MetaFormerBlock
from heedful.models.parts import ConvMlp
from tests.parity.harness import Tensors, adapter


@adapter("poolformer-pooling")
def pooling(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    x = inputs["x"]
    mixer = PoolMixer(x.shape[1], pool=config["pool_size"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(x)}


@adapter("metaformer-attention")
def attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MetaFormerAttention(config["dim"], head_dim=config["head_dim"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("poolformer-block")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim = config["dim"]
    made = MetaFormerBlock(
        dim,
        PoolMixer(dim),
        ConvMlp(dim, int(dim * config["mlp_ratio"])),
        norm=lambda dim: nn.GroupNorm(1, dim),
        layer_scale=1e-5,
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}


@adapter("metaformer-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = MetaFormer(
        classes=config["num_classes"],
        depths=config["layers"],
        dims=config["embed_dims"],
        mixers=("poolformer", "poolformer", "spatial-fc", "metaformer-attention"),
        norm="layer",
        positions=3,
        image_size=64,
        mlp_ratio=config["mlp_ratios"][0],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
