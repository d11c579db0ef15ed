"""PATNet: its three partial attentions, a block with self-attention, and a model."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.patnet import (
    PartialChannelAttention,
    PartialSelfAttention,
    PartialSpatialAttention,
)
from heedful.models.patnet import Block, PATNet
from tests.parity.harness import Tensors, adapter


def heads(config: Any) -> int:
    return 4 if config["patnet_t0"] else 6


@adapter("patnet-pat-ch")
def channel(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = PartialChannelAttention(config["dim"], parts=config["n_div"])
    return {"y": authors.load(mixer, params).eval()(inputs["x"])}


@adapter("patnet-pat-sf")
def self_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = PartialSelfAttention(config["dim"], parts=config["n_div"], heads=heads(config))
    return {"y": authors.load(mixer, params).eval()(inputs["x"])}


@adapter("patnet-pat-sp")
def spatial(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = PartialSpatialAttention(config["dim"])
    return {"y": authors.load(mixer, params).eval()(inputs["x"])}


@adapter("patnet-block-self")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = Block(
        config["dim"],
        attention=config["channel_type"] == "self",
        spatial=config["use_spatial"],
        mlp_ratio=config["mlp_ratio"],
        act=config["act"].lower(),
        heads=heads(config),
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}


@adapter("patnet-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = PATNet(
        classes=config["num_classes"],
        dim=config["embed_dim"],
        depths=config["depths"],
        mlp_ratio=config["mlp_ratio"],
        feature_dim=config["feature_dim"],
        act=config["act_layer"].lower(),
        spatial=config["use_spatial_attn"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
