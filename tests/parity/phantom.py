"""Phantom: the authors' attention of queries, keys and values, with its copies and gates."""

from __future__ import annotations

from typing import Any

from heedful.authors import table_of
from heedful.mixers.heads.phantom import PhantomAttention, token_at
from tests.parity.harness import Tensors, adapter


@adapter("phantom", "phantom-eta0.5")
def phantom(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    query, key, value = (inputs[name].transpose(1, 2) for name in "qkv")
    heads, d = query.shape[1], config["head_dim"]
    mixer = PhantomAttention(heads * d, heads=heads, kv_heads=key.shape[1], eta=config["eta"]).eval()
    # The recorded call begins after the projections and ends before the last one.
    own = ("query.weight", "key.weight", "value.weight", "out.weight")
    projections = {name: p for name, p in mixer.state_dict().items() if name in own}
    mixer.load_state_dict(projections | table_of(PhantomAttention).apply(params), strict=True)
    first = inputs["phantom_position"].long().argmax(1)
    y = mixer.attend(query, key, value, special=token_at(query, first), first=first)
    return {"y": y.transpose(1, 2)}
