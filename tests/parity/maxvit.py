"""MaxViT: the authors' relative attention on the tokens of one window."""

from __future__ import annotations

import math
from typing import Any

import torch

from heedful.mixers.grid.maxvit import MultiAxisAttention
from tests.parity.harness import Tensors, adapter


@adapter("maxvit-attention")
def attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    params = {name.removeprefix("attention/"): array for name, array in params.items()}
    dim, x = config["hidden_size"], inputs["x"]
    side = math.isqrt(x.shape[1])
    mixer = MultiAxisAttention(dim, head_dim=config["head_size"], size=side)
    # Their kernels are (in, heads, width) and (heads, width, out).
    mixer.load_state_dict(
        {
            "qkv.weight": torch.cat([params[f"{part}/weight"].reshape(dim, dim).T for part in "qkv"]),
            "qkv.bias": torch.cat([params[f"{part}/bias"].flatten() for part in "qkv"]),
            "proj.weight": params["o/weight"].reshape(dim, dim).T,
            "proj.bias": params["o/bias"],
            "relative_bias": params["relative_bias"],
        },
        strict=True,
    )
    y = mixer.eval()(x.transpose(1, 2).unflatten(2, (side, side)))
    return {"y": y.flatten(2).transpose(1, 2)}
