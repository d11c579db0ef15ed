"""Boosted attention to informed tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from heedful.steer.paint import boost, informed_tokens
from tests.parity.harness import Tensors, adapter

ORDER = "the order in which the authors' sets list their patches is not stated"


def _inputs(config: Any, drawn: Tensors) -> Tensors:
    """Attention with four outliers, one of them among the nine local patches, as the stated sizes have it."""
    made = {name: a.softmax(-1) if name.startswith("vit") else a for name, a in drawn.items()}
    first, penultimate = torch.zeros(36), torch.linspace(0.001, 0.002, 36)
    first[:9], penultimate[8:12] = 0.1, 0.2
    made["vit_attn0"][:, :, 0, 1:], made["vit_attn2"][:, :, 0, 1:] = first, penultimate
    return made


@adapter("paint", ignore={"local": ORDER, "summary": ORDER}, inputs=_inputs)
def paint(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    first, penultimate = (inputs[f"vit_attn{layer}"][:, :, 0, 1:].sum(1) for layer in (0, 2))
    local, summary = informed_tokens(first, penultimate, local_ratio=config["local_ratio"])
    x, (heads, d) = inputs["x"], (config["heads"], config["head_dim"])
    q, k, v = (
        F.linear(x, params[f"{name}_proj.weight"]).unflatten(-1, (heads, d)).transpose(1, 2) for name in "qkv"
    )
    coefficient = x.new_zeros(x.shape[:2])
    begin = config["img_start"]
    coefficient[:, begin : begin + config["num_vision_tokens"]] = (
        config["alpha"] * local + config["beta"] * summary
    )
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    weights = boost((q @ k.mT * d**-0.5).masked_fill(hidden, -torch.inf), coefficient).softmax(-1)
    output = F.linear((weights @ v).transpose(1, 2).flatten(2), params["o_proj.weight"])
    return {
        "local": local[0].nonzero()[:, 0],
        "summary": summary[0].nonzero()[:, 0],
        "attn_last_row": weights[:, :, -1],
        "output": output,
    }
