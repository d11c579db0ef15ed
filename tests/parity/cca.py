"""CCA: the reviewed port of the authors' attention, with several KV heads and with one."""

from __future__ import annotations

from typing import Any

import torch

import heedful
from heedful import authors
from heedful.mixers.heads.cca import CompressedConvolutionalAttention
from heedful.ops.rotary import rotate
from heedful.patterns import Causal
from tests.parity.harness import Tensors, adapter


@adapter("cca", "cca-g1")
def cca(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = CompressedConvolutionalAttention(
        config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        channel_kernel=config["cca_time0"],
        head_kernel=config["cca_time1"],
        rotary_base=config["rope_theta"],
        rotary_fraction=config["partial_rotary_factor"],
        qkv_bias=config["attention_bias"],
    ).eval()
    authors.load(mixer, params)
    x = inputs["x"]
    query, key, value, _, _ = mixer.project(x)
    query_normed, key_normed = mixer.normalise(query, key)
    padded = mixer.project(x, mask=inputs["conv_mask"] > 0)[:3]
    # The weights are those of the given angles, of which cos and sin hold each twice; the mixer computes
    # them for positions 0, 1, 2, ...
    angles = tuple(inputs[name].chunk(2, dim=-1)[0] for name in ("cos", "sin"))
    one_hot = torch.eye(x.shape[1], dtype=x.dtype).expand(*key.shape[:2], -1, -1)
    attn = heedful.attention(
        rotate(query_normed, angles), rotate(key_normed, angles), one_hot, pattern=Causal()
    )
    named = {
        "q": query,
        "k": key,
        "v": value,
        "q_normed": query_normed,
        "k_normed": key_normed,
        **dict(zip(("q_padded", "k_padded", "v_padded"), padded, strict=True)),
    }
    return {"y": mixer(x), "attn": attn, **{name: a.transpose(1, 2) for name, a in named.items()}}
