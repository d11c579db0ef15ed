"""Sparsifiner's attention: predicted connectivity, attention inside it, and token pruning."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from heedful.ops.attention import attention
from heedful.routing.connectivity import ConnectivityPredictor, keep_patches
from tests.parity.harness import Tensors, adapter

_NAMES = {
    "proj_c_q.weight": "query.weight",
    "proj_c_q.bias": "query.bias",
    "proj_c_k.weight": "key.weight",
    "proj_c_k.bias": "key.bias",
    "proj_n": "reduce",
    "proj_back_n": "expand",
}


@adapter("sparsifiner", "sparsifiner-tokenmask")
def sparsifiner(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    heads, tokens, dim = config["num_heads"], config["num_tokens"], config["dim"]
    told = config["cfg"]["SPAR"]
    predictor = ConnectivityPredictor(
        dim // heads,
        tokens,
        heads=heads,
        keep_rate=config["attn_keep_rate"],
        reduce_tokens=config["reduce_n_factor"],
        reduce_dim=config["reduce_c_factor"],
        coefficients=told["BASIS_COEF"]["TOPK"],
        basis_threshold=told["BASIS_THRESHOLD"],
    )
    weights = {ours: params[f"mask_predictor.{theirs}"] for theirs, ours in _NAMES.items()}
    predictor.load_state_dict(weights, strict=True)

    x, active = inputs["x"], inputs.get("prev_token_mask")
    qkv = F.linear(x, params["qkv.weight"], params["qkv.bias"])
    query, key, value = rearrange(qkv, "b n (s h d) -> s b h n d", s=3, h=heads)
    if active is not None:
        pruned = ~F.pad(active, (1, 0), value=True)[:, None, :, None]
        query, key, value = (y.masked_fill(pruned, 0) for y in (query, key, value))
    scores, rows = predictor.scores(query, key, active=active)
    seen = predictor.groups(predictor.pick(scores, active))
    y = attention(query, key, value, pattern=seen)
    # Attention to the unit vectors gives the weights themselves.
    unit = torch.eye(tokens).expand(len(x), heads, -1, -1)
    attended = attention(query, key, unit, pattern=seen)
    outputs = {
        "y": F.linear(rearrange(y, "b h n d -> b n (h d)"), params["proj.weight"], params["proj.bias"]),
        "attn_mask": seen.dense(len(x), heads).float(),
        "approx_attn": scores,
        "basis_coef": rows,
        "masked_attn": attended,
    }
    if config.get("token_pruning_this_layer"):
        keep = math.ceil(config["token_keep_rate"] * (tokens - 1))
        outputs["token_mask"] = keep_patches(attended[:, :, 0, 1:], keep, active)
    return outputs
