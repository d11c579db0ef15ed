"""RCMHA: the authors' module, with three keys of memory before the segment."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from heedful.mixers.heads.rcmha import RelativeConvMultiHeadAttention
from tests.parity.harness import Tensors, adapter

NAMES = {
    "query.0.linear.weight": "query.weight",
    "key.0.linear.weight": "key.weight",
    "value.0.linear.weight": "value.weight",
    "value.0.linear.bias": "value.bias",
    "query.1.conv.weight": "query_conv.weight",
    "query.1.conv.bias": "query_conv.bias",
    "key.1.conv.weight": "key_conv.weight",
    "key.1.conv.bias": "key_conv.bias",
    "value.1.conv.weight": "value_conv.weight",
    "value.1.conv.bias": "value_conv.bias",
    "key_pos_embeddings": "position",
    "key_pos_bias": "position_bias",
    "query_pos_bias": "query_bias",
    "output.weight": "out.weight",
    "output.bias": "out.bias",
}


@adapter("rcmha")
def rcmha(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = RelativeConvMultiHeadAttention(
        config["d_model"],
        heads=config["heads"],
        max_length=len(params["key_pos_bias"]) // 2,  # the file holds the middle rows of the tables
        dropout=config["dropout_prob"],
    ).eval()
    mixer.load_state_dict({NAMES[name]: a for name, a in params.items()}, strict=True)
    x, source = inputs["query"].transpose(0, 1), inputs["key"].transpose(0, 1)
    query, _ = mixer.convolve(mixer.query(x), mixer.query_conv, None, None)
    key, _ = mixer.convolve(mixer.key(source), mixer.key_conv, None, None)
    one_hot = torch.eye(source.shape[1], dtype=x.dtype).expand(*key.shape[:2], -1, -1)
    return {
        "y": mixer(x, context=source).transpose(0, 1),  # the file's mask is the causal one
        "attn_ijbh": rearrange(mixer.attend(query, key, one_hot), "b h i j -> i j b h"),
    }
