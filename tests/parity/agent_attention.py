"""Agent attention: the authors' modules for Swin (the plain form) and DeiT (with a class token)."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.agent_attention import AgentAttention, AgentAttentionDeiT
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
    mixer.load_state_dict(params, strict=True)
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
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}
