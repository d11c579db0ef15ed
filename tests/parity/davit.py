"""DaViT: the attention between channels, the two blocks and the model; the authors' modules take tokens."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.davit import ChannelGroupAttention, DaViTWindowAttention
from heedful.models.davit import Block, DaViT
from tests.parity.harness import Tensors, adapter

SIZE = (5, 7)  # of the maps of the two blocks


@adapter("davit-channel-attention")
def channel_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = ChannelGroupAttention(config["dim"], heads=config["num_heads"], qkv_bias=config["qkv_bias"])
    return {"y": authors.load(mixer, params).eval()(inputs["x"].mT).mT}


@adapter("davit-spatial-block", "davit-channel-block")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim, heads = config["dim"], config["num_heads"]
    mixer = (
        DaViTWindowAttention(dim, heads=heads, window=config["window_size"])
        if "window_size" in config
        else ChannelGroupAttention(dim, heads=heads, qkv_bias=config["qkv_bias"])
    )
    made = authors.load(Block(dim, mixer, 4 * dim), params).eval()
    return {"y": made(inputs["x"].mT.unflatten(2, SIZE)).flatten(2).mT}


@adapter("davit-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = DaViT(
        classes=config["num_classes"],
        depths=config["depths"],
        dims=config["embed_dims"],
        heads=config["num_heads"],
        window=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
