"""Grouped differential attention: the authors' inference code, unbalanced and balanced."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from heedful import authors
from heedful.mixers.heads.grouped_differential_attention import GroupedDifferentialAttention, depth_lambda
from tests.parity.harness import Tensors, adapter

PROJECTIONS = ("query", "key", "value", "out")


@adapter("grouped-differential-attention", "grouped-differential-attention-balanced")
def grouped_differential_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    heads, head_dim = config["num_heads"], config["head_dim"]
    mixer = GroupedDifferentialAttention(
        heads * head_dim,  # the call is between the projections: its width does not matter
        heads=heads,
        noise_heads=config["num_noise_heads"],
        kv_heads=config["num_kv_heads"],
        head_dim=head_dim,
        lambda_init=depth_lambda(config["layer_idx"] - 1),
        norm_eps=config["attn_rms_norm_eps"],
        causal=config["causal"],
    ).eval()
    given = authors.table_of(GroupedDifferentialAttention).apply(params)
    untouched = {n: a for n, a in mixer.state_dict().items() if n.split(".")[0] in PROJECTIONS}
    mixer.load_state_dict({**untouched, **given}, strict=True)
    query, key, value = (rearrange(inputs[n], "t (h d) -> 1 h t d", d=head_dim) for n in "qkv")
    return {
        "y": rearrange(mixer.difference(query, key, value), "1 h t d -> t (h d)"),
        "lambda_full": mixer.lambda_full(),
        "lambda_init": torch.tensor(mixer.lambda_init, dtype=torch.float64),
    }
