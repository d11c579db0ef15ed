"""Scatterbrain: the authors' local and LSH attention, the latter causal too, with their clusters as given."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from heedful.mixers.sparse.scatterbrain import ScatterbrainLocalAttention, ScatterbrainLSHAttention
from tests.parity.harness import Tensors, adapter


def permutations(config: Any, inputs: Tensors) -> Tensors:
    """Inputs whose positions are permutations, as hashing gives them."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(a.shape, generator=generator).argsort(-1) if name.endswith("_positions") else a
        for name, a in inputs.items()
    }


@adapter("scatterbrain", inputs=permutations)
def scatterbrain(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    query, key, value = (inputs[name].transpose(1, 2) for name in "qkv")
    b, h, n, d = query.shape
    one_hot = torch.eye(n, dtype=value.dtype).expand(b, h, -1, -1)
    outputs = {}
    for variant, told in config.items():
        features = told["nb_features"]
        mixer: ScatterbrainLocalAttention | ScatterbrainLSHAttention
        if variant == "local":
            mixer = ScatterbrainLocalAttention(
                h * d, heads=h, window=told["local_context"], features=features
            )
        else:
            mixer = ScatterbrainLSHAttention(
                h * d,
                heads=h,
                cluster_size=told["q_cluster_size"],
                rounds=told["n_hashes"],
                features=features,
            )
        mixer.projection.copy_(params[f"{variant}.projection_matrix"])

        def attend(v: Tensor, mixer: Any = mixer, variant: str = variant, told: Any = told) -> Tensor:
            if variant == "local":
                return mixer.attend(query, key, v)
            orders = (
                rearrange(inputs[f"{variant}.{side}_positions"], "r (b h) n -> r b h n", h=h) for side in "qk"
            )
            return mixer.attend(query, key, v, *orders, causal=told.get("causal", False))

        outputs[f"{variant}.y"] = attend(value).transpose(1, 2)
        outputs[f"{variant}.attn"] = attend(one_hot)  # with one-hot values attention gives its weights
    return outputs
