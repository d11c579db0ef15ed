"""Neighborhood masks of the authors' FlexAttention path, and attention through them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from heedful import attention, patterns
from tests.parity.harness import Tensors, adapter


@adapter("faster-neighborhood-attention")
def faster_neighborhood_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    """Each case: the mask in bits (rows are queries), and y on (1, tokens, heads, dim) with scale 0.5."""
    outputs = {}
    for case in config["cases"]:
        pattern = patterns.Neighborhood(
            *(tuple(case[name]) for name in ("shape", "kernel_size", "stride", "dilation", "is_causal"))
        )
        i = case["index"]
        seen = pattern.mask(math.prod(case["shape"]))[0, 0]
        outputs[f"mask_{i}"] = torch.from_numpy(np.packbits(seen.numpy(), axis=-1))
        q, k, v = (inputs[f"{name}_{i}"].transpose(1, 2) for name in "qkv")
        outputs[f"y_{i}"] = attention(q, k, v, pattern=pattern, scale=0.5).transpose(1, 2)
    return outputs
