"""Landmark attention: the authors' layer and grouped softmax, and their memory cache."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from heedful.mixers.sparse.landmark_attention import LandmarkAttention
from heedful.mixers.sparse.landmark_memory import SELECTIONS, LandmarkMemory
from heedful.ops.landmark import landmark_softmax
from heedful.ops.rotary import rotate
from tests.parity.harness import Tensors, adapter


def _mixer(config: Any, params: Tensors, block_size: int) -> LandmarkAttention:
    mixer = LandmarkAttention(
        config["n_embd"],
        heads=config["n_head"],
        block_size=block_size,
        insert=False,
        dropout=config["dropout"],
    )
    query, key, value = params["c_attn.weight"].chunk(3)
    weights = {
        "query.weight": query,
        "key.weight": key,
        "value.weight": value,
        "out.weight": params["c_proj.weight"],
    }
    mixer.load_state_dict(weights, strict=True)
    return mixer.eval()


@adapter("landmark-attention")
def landmark_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    x, is_landmark = inputs["x"], inputs["is_mem"]
    # Landmarks may stand anywhere here, which is the business of `landmark_softmax`; blocks are not regular.
    mixer = _mixer(config, params, block_size=config["sequence_length"])
    query, key, value = mixer.project(x)
    angles = torch.arange(x.shape[1])[:, None] * params["freqs"]
    query, key = (rotate(y, angles, pairing="interleaved") for y in (query, key))
    weights = landmark_softmax(query @ key.mT * mixer.head_dim**-0.5, is_landmark)
    y = mixer.out(rearrange(weights @ value, "b h n d -> b n (h d)"))
    return {"y": y, "probs": landmark_softmax(inputs["scores"], is_landmark)}


@adapter("landmark-attention-cache")
def landmark_attention_cache(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    block_size = config["mem_cache_freq"]
    mixer = _mixer(config, params, block_size)
    outputs = {}
    for selection in SELECTIONS:
        memory = LandmarkMemory(
            mixer, blocks=config["mem_cache_size"], topk=config["cache_topk"], selection=selection
        )
        state = memory.init_state(config["batch_size"])
        for c in range(len(config["chunks"])):
            place = state.length + torch.arange(inputs[f"hidden{c}"].shape[1])
            y, state = memory(inputs[f"hidden{c}"], state)
            outputs[f"{selection}.chunk{c}"] = y
            outputs[f"{selection}.final{c}"] = y[:, place % (block_size + 1) < block_size]
    return outputs
