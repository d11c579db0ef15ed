"""Agent attention: the authors' modules for Swin (the plain form), DeiT, PVT and CSwin, and AgentSD."""

from __future__ import annotations

from typing import Any

from heedful.authors import load
from heedful.mixers.grid.agent_attention import (
    AgentAttention,
    AgentAttentionDeiT,
    AgentAttentionPVT,
    AgentCore,
    in_stripes,
)
from tests.parity.harness import Tensors, adapter


@adapter("agent-attention-swin")
def agent_swin(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    height, width = config["window_size"]
    mixer = AgentAttention(
        config["dim"],
        heads=config["num_heads"],
        agents=config["agent_num"],
        size=(height, width),
    )
    load(mixer, params)
    x = inputs["x"].transpose(1, 2).unflatten(2, (height, width))
    return {"y": mixer.eval()(x).flatten(2).transpose(1, 2)}


@adapter("agent-attention-deit")
def agent_deit(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = AgentAttentionDeiT(
        config["dim"],
        heads=config["num_heads"],
        agents=config["agent_num"],
        size=(config["window"], config["window"]),
        qkv_bias=config["qkv_bias"],
    )
    load(mixer, params)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("agent-attention-pvt-sr2")
def agent_pvt(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = AgentAttentionPVT(
        config["dim"],
        heads=config["num_heads"],
        agents=config["agent_num"],
        size=(8, 8),
        reduction=config["sr_ratio"],
        qkv_bias=config["qkv_bias"],
    )
    x = inputs["x"].transpose(1, 2).unflatten(2, (8, 8))
    return {"y": load(mixer, params).eval()(x).flatten(2).transpose(1, 2)}


@adapter("agent-attention-cswin")
def agent_cswin(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    side, stripe = config["resolution"], config["split_size"]
    core = AgentCore(
        config["dim"], heads=config["num_heads"], agents=config["agent_num"], size=(side, stripe)
    )
    qkv = inputs["qkv"].mT.unflatten(3, (side, side))
    y = in_stripes(load(core, params).eval(), qkv, stripe=stripe, axis=-1)
    return {"y": y.flatten(2).mT}
