"""Agent attention: the authors' modules for Swin (the plain form), DeiT, PVT and CSwin, and AgentSD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heedful.authors import load
from heedful.mixers.grid.agent_attention import (
    AgentAttention,
    AgentAttentionDeiT,
    AgentAttentionPVT,
    AgentCore,
    in_stripes,
)
from heedful.ops.attention import attention
from heedful.ops.token_merge import match_tokens
from heedful.steer.agentsd import AgentSD
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


class _Host(nn.Module):
    """The attention that AgentSD is put into."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))


@adapter("agentsd")
def agentsd(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    x = inputs["x"]
    host = _Host(x.shape[-1], config["heads"])
    host.load_state_dict(params, strict=True)
    match = match_tokens(x, size=(config["h"], config["w"]), stride=(config["sy"], config["sx"]))
    counts = [int(x.shape[1] * config[name]) for name in ("ratio", "agent_ratio")]
    count, agent_count = (min(count, match.source.shape[1]) for count in counts)
    merged, agents = match.merge(x, count), match.merge(x, agent_count)
    steer = AgentSD(power=config["k_scale2"], shortcut=config["k_shortcut"])
    # The targets at the end stand row by row; the authors' unstable sort gave another order.
    order = torch.tensor([0, 2, 3, 1])
    rows = torch.cat([torch.arange(merged.shape[1] - 4), merged.shape[1] - 4 + order])
    return {
        "merged": merged[:, rows],
        "agents": agents[:, order],
        "unmerged": match.unmerge(merged, count),
        "attn": steer.attend(host, merged, agents)[:, rows],
        "attn_no_agent": host(merged)[:, rows],
    }
