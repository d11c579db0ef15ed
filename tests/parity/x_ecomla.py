"""Multi-head latent attention: the authors' DeepSeek layer, and its start from an attention's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import heedful
from heedful.convert.mla_init import mla_from_attention
from heedful.mixers.heads.multi_head_latent_attention import MultiHeadLatentAttention
from heedful.patterns import Causal
from tests.parity.harness import Tensors, adapter


def build(config: Any, query_rank: int, kv_rank: int) -> MultiHeadLatentAttention:
    return MultiHeadLatentAttention(
        config["hidden_size"],
        heads=config["num_attention_heads"],
        query_rank=query_rank,
        kv_rank=kv_rank,
        nope_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        latent_norm=config["use_lora_layer_norm"],
        rotary_base=config["rope_theta"],
    ).eval()


def run(mixer: MultiHeadLatentAttention, x: Tensor) -> Tensors:
    query, latent = mixer.project(x)
    key, _ = mixer.keys_values(latent)
    one_hot = torch.eye(x.shape[1], dtype=x.dtype).expand(*key.shape[:2], -1, -1)
    return {"y": mixer(x), "attn": heedful.attention(query, key, one_hot, pattern=Causal())}


@adapter("mla")
def mla(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = build(config, config["q_lora_rank"], config["kv_lora_rank"])
    return run(heedful.authors.load(mixer, params), inputs["x"])


@adapter("x-ecomla-init")
def x_ecomla_init(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    # The parameters are what the authors' start gave; here they are made from the same old weights.
    weights = mla_from_attention(
        inputs["q_proj"],
        inputs["k_proj"],
        inputs["v_proj"],
        inputs["o_proj"],
        heads=config["num_attention_heads"],
        kv_heads=config["llama_num_key_value_heads"],
        nope_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        query_rank=config["q_lora_rank"],
        kv_rank=config["kv_lora_rank"],
        query_energy=config["q_energy_ratio"],
        kv_energy=config["kv_energy_ratio"],
    )
    kv_rank = weights["kv_up.weight"].shape[1]
    mixer = build(config, len(weights["query_down.weight"]), kv_rank)
    mixer.load_state_dict(weights, strict=True)
    kv_down = weights["kv_down.weight"]
    return {
        "q_rank": torch.tensor(mixer.query_rank),
        "kv_rank": torch.tensor(kv_rank),
        "q_product": weights["query_up.weight"] @ weights["query_down.weight"],
        "kv_product": weights["kv_up.weight"] @ kv_down[:kv_rank],
        "k_pe_rows": kv_down[kv_rank:],
        **run(mixer, inputs["x"]),
    }
