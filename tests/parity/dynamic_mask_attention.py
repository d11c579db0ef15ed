"""Dynamic mask attention: the layer of the Doge models, and the mask builder of flash-dmattn."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from heedful.mixers.sparse.dynamic_mask_attention import DynamicMaskAttention
from heedful.routing.dynamic_mask import topk_bias_mask
from tests.parity.harness import Tensors, adapter

_NAMES = {
    "q_proj.weight": "query.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "o_proj.weight": "out.weight",
    "dt_proj.weight": "worth.weight",
    "A": "gain",
    "q_norm.weight": "query_norm.weight",
    "k_norm.weight": "key_norm.weight",
}


@adapter("dynamic-mask-attention")
def dynamic_mask_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = DynamicMaskAttention(
        config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        window=config["keep_window_size"],
    ).eval()
    mixer.load_state_dict({_NAMES[name]: a for name, a in params.items()}, strict=True)
    x = inputs["x"]
    half = config["head_dim"] // 2  # cos and sin are given once for each channel of a pair
    angles = (inputs["cos"][0, :, :half], inputs["sin"][0, :, :half])
    query, key, value = mixer.project(x, angles)
    # The last query sees every key that is not padding; the mask is causal otherwise.
    tokens = inputs["attention_mask"][:, 0, -1]
    score = mixer.scores(value)
    n = x.shape[1]
    one_hot = torch.eye(n, dtype=x.dtype).expand(*key.shape[:2], -1, -1)
    attn = mixer.attend(query, key, one_hot, score, tokens)
    # A query that sees nothing gives zeros here; there it looks at all keys alike.
    attn = torch.where(attn.sum(-1, keepdim=True) > 0, attn, 1 / n)
    values = value.repeat_interleave(mixer.heads // mixer.kv_heads, dim=1)
    y = mixer.out(rearrange(attn @ values, "b h n d -> b n (h d)"))

    bias = inputs["bias"]
    causal = torch.ones(bias.shape[-2:], dtype=torch.bool).tril(bias.shape[-1] - bias.shape[-2])[None, None]
    return {
        "y": y,
        "attn": attn,
        "mask_topk": topk_bias_mask(bias, 6, mask=causal),
        "mask_topk_block4": topk_bias_mask(bias, 9, mask=causal, block_size=4),
        "mask_relu": topk_bias_mask(bias, mask=causal, kind="relu"),
        "mask_global": topk_bias_mask(bias[:, :, :1], 6),
    }
