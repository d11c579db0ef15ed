"""Rectified SpaAttn: the form for Wan (video alone), that for HunyuanVideo (with text), and the curve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import heedful
from heedful.routing.gilbert import block_neighbors, gilbert_order
from heedful.routing.rectified_blocks import rectified_attention
from tests.parity.harness import Tensors, adapter


@adapter("rectified-spaattn")
def rectified_spaattn(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    curve = config["gilbert"]
    size = (curve["t"], curve["h"], curve["w"])
    touching = block_neighbors(size, curve["neighbor_block"])
    outputs = {"linear_to_gilbert": gilbert_order(size).argsort().int(), "block_neighbors": touching}
    for case in config["cases"]:
        make = _hunyuan if "text_slots" in case else _wan
        outputs[case["out"]] = make(case, inputs, touching)
    return outputs


def _wan(case: Any, inputs: Tensors, touching: Tensor) -> Tensor:
    query, key, value = (inputs[f"wan_{x}"] for x in "qkv")
    blocks = -(-query.shape[2] // case["block"])
    neighbors = touching if case["neighbors"] != "identity" else torch.eye(blocks, dtype=torch.bool)
    return rectified_attention(
        query,
        key,
        value,
        block_size=case["block"],
        top_k=case["top_k"],
        p_remain=case["p_remain"],
        neighbors=neighbors,
        first_blocks=case["first_frame_blocks"],
    )


def _hunyuan(case: Any, inputs: Tensors, touching: Tensor) -> Tensor:
    query, key, value = (inputs[f"hy_{x}"] for x in "qkv")
    real = query.shape[2] - case["text_slots"] + case["valid_text"]
    key, value = key[:, :, :real], value[:, :, :real]
    out = rectified_attention(
        query[:, :, :real],
        key,
        value,
        block_size=case["block"],
        top_k=case["top_k"],
        p_remain=case["p_remain"],
        neighbors=inputs["hy_neighbors"],
        text=case["valid_text"],
    )
    # Slots without text ask too, and are answered like text.
    return torch.cat([out, heedful.attention(query[:, :, real:], key, value)], dim=2)
