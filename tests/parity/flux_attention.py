"""Flux attention: the router of a layer, in its evaluation form."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.routing.layer_router import LayerRouter, pool_ends
from tests.parity.harness import Tensors, adapter


@adapter("flux-attention")
def flux_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    router = authors.load(LayerRouter(config["d_feature"]), params).eval()
    outputs: Tensors = {}
    for prefix, name in (("", "q"), ("short_", "q_short")):
        query = inputs[name].transpose(1, 2)
        pooled = pool_ends(query, config["pool_size"])
        heads = query.shape[1]
        full = router.decide(pooled)[:, None].expand(-1, heads)
        outputs |= {
            f"{prefix}logits": router(pooled)[:, None].expand(-1, heads, -1),
            f"{prefix}decisions": router(pooled).softmax(-1)[:, 1:].expand(-1, heads),
            f"{prefix}hard_decisions": _one_hot(full),
            f"{prefix}sparse_mask": full[..., None],
            f"{prefix}pooled_hidden_states": router.features(pooled)[:, None].expand(-1, heads, -1),
        }
    return outputs


def _one_hot(full: Any) -> Any:
    return (full[..., None] == full.new_tensor([0.0, 1.0])).to(full.dtype)
