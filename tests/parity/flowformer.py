"""Flow attention: the authors' modules, normal (cross and self) and causal.

Their modules have another width in than out, and keys and values of their own; heedful's have one width and
one context. So the operator is called, between the authors' linear maps.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from heedful.ops.flow import flow_attention
from tests.parity.harness import Tensors, adapter


@adapter("flowformer")
def normal(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    queries, keys, values = (inputs[name] for name in ("queries", "keys", "values"))
    return {
        "y": _module(config, params, queries, keys, values, causal=False),
        "self": _module(config, params, keys, keys, keys, causal=False),
    }


@adapter("flowformer-causal")
def causal(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    x = inputs["x"]
    return {"y": _module(config, params, x, x, x, causal=True)}


def _module(
    config: Any, params: Tensors, queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool
) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, params[f"{name}_projection.weight"], params[f"{name}_projection.bias"])

    query, key, value = (
        rearrange(linear(name, x), "b n (h d) -> b h n d", h=config["n_heads"])
        for name, x in (("query", queries), ("key", keys), ("value", values))
    )
    heads = flow_attention(query, key, value, causal=causal)
    return linear("out", rearrange(heads, "b h n d -> b n (h d)"))
