"""Sparsifiner's attention: predicted connectivity, attention inside it, and token pruning."""

from __future__ import annotations

import math
from typing import Any

import torch

from heedful import authors
from heedful.mixers.grid.sparsifiner import SparsifinerAttention
from heedful.ops.attention import attention
from heedful.routing.connectivity import keep_patches
from tests.parity.harness import Tensors, adapter


@adapter("sparsifiner", "sparsifiner-tokenmask")
def sparsifiner(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    heads, tokens = config["num_heads"], config["num_tokens"]
    side = math.isqrt(tokens - 1)
    told = config["cfg"]["SPAR"]
    mixer = SparsifinerAttention(
        config["dim"],
        heads=heads,
        size=(side, side),
        keep_rate=config["attn_keep_rate"],
        reduce_tokens=config["reduce_n_factor"],
        reduce_dim=config["reduce_c_factor"],
        coefficients=told["BASIS_COEF"]["TOPK"],
        basis_threshold=told["BASIS_THRESHOLD"],
        qkv_bias=config["qkv_bias"],
    )
    authors.load(mixer, params).eval()

    x, active = inputs["x"], inputs.get("prev_token_mask")
    query, key, _ = mixer.heads_of(x, active)
    scores, rows = mixer.predictor.scores(query, key, active=active)
    seen = mixer.predictor.groups(mixer.predictor.pick(scores, active))
    # Attention to the unit vectors gives the weights themselves.
    unit = torch.eye(tokens).expand(len(x), heads, -1, -1)
    attended = attention(query, key, unit, pattern=seen)
    outputs = {
        "y": mixer(x, active=active),
        "attn_mask": seen.dense(len(x), heads).float(),
        "approx_attn": scores,
        "basis_coef": rows,
        "masked_attn": attended,
    }
    if config.get("token_pruning_this_layer"):
        keep = math.ceil(config["token_keep_rate"] * (tokens - 1))
        outputs["token_mask"] = keep_patches(attended[:, :, 0, 1:], keep, active)
    return outputs
