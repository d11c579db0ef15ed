"""RAT: both attentions, a layer, a NAF block, the loss and a model."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.region_attention_transformer import RegionAttention
from heedful.models.region_attention_transformer import (
    Layer,
    NAFBlock,
    RegionAttentionTransformer,
    WindowAttention,
    focal_region_loss,
)
from tests.parity.harness import Tensors, adapter


@adapter("rat-region-attention")
def region(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = authors.load(RegionAttention(config["n_feat"], heads=config["num_heads"]), params).eval()
    return {"y": mixer(inputs["x"], labels=inputs["labels"][:, 0])}


@adapter("rat-window-attention")
def window(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = authors.load(WindowAttention(config["n_feat"], heads=config["num_heads"]), params).eval()
    return {"y": made(inputs["x"])}


@adapter("rat-basic-layer")
def layer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    """The file gives the mask of pairs; a pixel's label is the first pixel that it sees."""
    made = Layer(config["n_feat"], heads=config["num_heads"], mlp_ratio=config["mlp_ratio"])
    labels = (inputs["mask"] == 0).int().argmax(-1).unflatten(1, inputs["x"].shape[2:])
    return {"y": authors.load(made, params).eval()(inputs["x"], labels)}


@adapter("rat-nafblock")
def nafblock(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return {"y": authors.load(NAFBlock(config["c"]), params).eval()(inputs["x"])}


@adapter("rat-focal-region-loss")
def loss(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return {"y": focal_region_loss(inputs["input"], inputs["target"], inputs["labels"], beta=config["beta"])}


@adapter("rat-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = RegionAttentionTransformer(
        in_channels=inputs["x"].shape[1],
        dim=config["width"],
        middle=config["middle_blk_num"],
        encoders=config["enc_blk_nums"],
        decoders=config["dec_blk_nums"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"], inputs["labels"])}
