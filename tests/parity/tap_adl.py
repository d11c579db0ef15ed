"""Token-aware pooling, the diversification loss, channel processing, and TAP-FAN."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.channel.fan import ChannelProcessing
from heedful.mixers.grid.tap import TokenAwarePooling
from heedful.models.tap_fan import TAPFAN, Block
from heedful.ops.attention_diversity import attention_diversification_loss
from tests.parity.harness import Tensors, adapter


@adapter("tap-pooling")
def pooling(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    pool = authors.load(TokenAwarePooling(config["dim"], scales=config["num_scales"]), params).eval()
    x = inputs["x"]
    return {"mask": pool.weights(x).movedim(1, -1)[:, None], "y": pool(x)}


@adapter("adl-loss")
def loss(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    maps = [inputs["a0"], inputs["a1"], inputs["a2"]]
    return {"y": attention_diversification_loss(maps, threshold=config["th"])}


@adapter("fan-channel-processing")
def channel_processing(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = ChannelProcessing(
        config["dim"],
        heads=config["num_heads"],
        hidden=config["mlp_hidden_dim"],
        qkv_bias=config["qkv_bias"],
    )
    x = inputs["x"].transpose(1, 2).unflatten(2, (4, 4))
    return {"y": authors.load(mixer, params).eval()(x).flatten(2).transpose(1, 2)}


@adapter("tap-fan-block")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    hidden = int(config["mlp_ratio"] * config["dim"])
    made = Block(
        config["dim"], heads=config["num_heads"], hidden=hidden, scales=config["num_scales"], eps=1e-5
    )
    x = inputs["x"].transpose(1, 2).unflatten(2, (4, 4))
    y, attn = authors.load(made, params).eval()(x, True)
    return {"y": y, "attn": attn}


@adapter("tap-fan-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = TAPFAN(
        classes=config["num_classes"],
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        scales=config["num_scales"],
    )
    authors.load(made, params).eval()
    return {"y": made(inputs["x"]), "attn0": made.attention_maps(inputs["x"])[0]}
