"""Gated attention: the authors' Qwen3 attention with a headwise and with an elementwise gate."""

from __future__ import annotations

from typing import Any

import torch

import heedful
from heedful.mixers.heads.gated_attention import GatedAttention
from heedful.patterns import Causal
from tests.parity.harness import Tensors, adapter

NAMES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "q_norm": "query_norm",
    "k_norm": "key_norm",
}


@adapter("gated-attention-elementwise", "gated-attention-headwise")
def gated_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    gate = "headwise" if config["headwise_attn_output_gate"] else "elementwise"
    mixer = GatedAttention(
        config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        gate=gate,
        qk_norm=config["use_qk_norm"],
        rotary_base=config["rope_theta"],
        qkv_bias=config["qkv_bias"],
    ).eval()
    renamed = {f"{NAMES[name.split('.')[0]]}.{name.split('.')[1]}": a for name, a in params.items()}
    mixer.load_state_dict(renamed, strict=True)
    x = inputs["x"]
    # The given cos and sin are those of positions 0, 1, 2, ..., which the mixer computes.
    query, key, _, _ = mixer.project(x)
    one_hot = torch.eye(x.shape[1], dtype=x.dtype).expand(*key.shape[:2], -1, -1)
    attn = heedful.attention(query, key, one_hot, pattern=Causal())
    return {"y": mixer(x), "attn": attn}
