"""SQA: the authors' module, grouped with rotary embedding and symmetric without."""

from __future__ import annotations

from typing import Any

from heedful.mixers.heads.sqa import SparseQueryAttention
from tests.parity.harness import Tensors, adapter

NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}


@adapter("sqa", "sqa-symmetric")
def sqa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    # The buffers "rope.*" hold the frequencies and angles of base 10000, which heedful computes.
    weights = {name: a for name, a in params.items() if not name.startswith("rope.")}
    mixer = SparseQueryAttention(
        config["embed_dim"],
        heads=config["num_heads"],
        query_heads=config["num_query_groups"],
        kv_heads=config["num_groups"],
        causal=config["is_causal"],
        rotary=config["rope"] is not None,
        qkv_bias=config["use_bias"],
    )
    renamed = {f"{NAMES[name.split('.')[0]]}.{name.split('.')[1]}": a for name, a in weights.items()}
    mixer.load_state_dict(renamed, strict=True)
    return {"y": mixer.eval()(inputs["x"])}
