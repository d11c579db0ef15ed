"""Routing Transformer: the attention of the PyTorch port, causal, with shared q and k, and masked."""

from __future__ import annotations

from typing import Any

from heedful.mixers.sparse.kmeans_attention import KmeansAttention
from tests.parity.harness import Tensors, adapter

_NAMES = {"mem_key": "memory_key", "mem_value": "memory_value", "kmeans.means": "means"}


@adapter("routing-transformer")
def routing_transformer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    outputs = {}
    for variant, told in config.items():
        stored = {name[len(variant) + 1 :]: a for name, a in params.items() if name.startswith(variant + ".")}
        attention = KmeansAttention(
            heads=told["num_heads"],
            head_dim=told["head_dim"],
            clusters=told["num_clusters"],
            window=told["window_size"],
            causal=told["causal"],
            shared_qk=told.get("shared_qk", False),
            memories=stored["mem_key"].shape[2],
        ).eval()
        attention.load_state_dict({_NAMES[name]: a for name, a in stored.items() if name in _NAMES})
        key = inputs["q"] if attention.shared_qk else inputs["k"]
        outputs[f"{variant}.y"] = attention(inputs["q"], key, inputs["v"])
        outputs[f"{variant}.aux"] = attention.aux_loss
        if variant == "bidir":
            outputs["bidir_masked.y"] = attention(
                inputs["q"], inputs["k"], inputs["v"], mask=inputs["query_mask"]
            )
    return outputs
