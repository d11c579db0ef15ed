"""RCMHA: the authors' module, with three keys of memory before the segment."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from heedful import authors
from heedful.mixers.heads.rcmha import RelativeConvMultiHeadAttention
from tests.parity.harness import Tensors, adapter


@adapter("rcmha")
def rcmha(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = RelativeConvMultiHeadAttention(
        config["d_model"],
        heads=config["heads"],
        max_length=len(params["key_pos_bias"]) // 2,  # the file holds the middle rows of the tables
        dropout=config["dropout_prob"],
    ).eval()
    authors.load(mixer, params)
    x, source = inputs["query"].transpose(0, 1), inputs["key"].transpose(0, 1)
    query, _ = mixer.convolve(mixer.query(x), mixer.query_conv, None, None)
    key, _ = mixer.convolve(mixer.key(source), mixer.key_conv, None, None)
    one_hot = torch.eye(source.shape[1], dtype=x.dtype).expand(*key.shape[:2], -1, -1)
    return {
        "y": mixer(x, context=source).transpose(0, 1),  # the file's mask is the causal one
        "attn_ijbh": rearrange(mixer.attend(query, key, one_hot), "b h i j -> i j b h"),
    }
