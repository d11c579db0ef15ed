"""HiDiffusion: window attention inside the authors' transformer block, whose other parts give nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from heedful.mixers.grid.hidiffusion import ModifiedShiftedWindowAttention, feature_size, shift_at
from tests.parity.harness import Tensors, adapter


@adapter("hidiffusion-mswmsa")
def mswmsa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = ModifiedShiftedWindowAttention(config["C"], heads=config["heads"]).eval()
    weights = {
        "qkv.weight": torch.cat([params[f"attn1.to_{x}.weight"] for x in "qkv"]),
        "proj.weight": params["attn1.to_out.weight"],
        "proj.bias": params["attn1.to_out.bias"],
    }
    mixer.load_state_dict(weights, strict=True)
    outputs = {}
    for case in config["cases"]:
        x = inputs[case["x"]]
        size = feature_size(x.shape[1], tuple(case["unet_input_size"]))
        normed = F.layer_norm(x, x.shape[-1:], params["norm1.weight"], params["norm1.bias"])
        y = mixer(normed.transpose(1, 2).unflatten(2, size), shift=shift_at(case["rand"]))
        outputs[case["out"]] = x + y.flatten(2).transpose(1, 2)
    return outputs
