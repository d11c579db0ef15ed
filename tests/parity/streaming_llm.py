"""StreamingLLM: what stays of keys and values, after a call and before one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.cache.streaming import StreamingLayer
from tests.parity.harness import Tensors, adapter


@adapter("streaming-llm")
def streaming_llm(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    key, value = inputs["key"], inputs["value"]
    sinks, window = config["start_size"], config["recent_size"]

    def layer(key: Tensor, sinks: int, window: int) -> StreamingLayer:
        made = StreamingLayer(sinks, window, None)
        made.store(key, value)
        return made

    called = layer(key, sinks, window)
    called.retain(None, 1.0, None)
    before = layer(key, sinks, window)
    before.make_room(5)
    ranged = layer(key, sinks, window)
    ranged.keep(torch.cat([torch.arange(3), torch.arange(8, key.shape[2])]).expand(len(key), -1))
    # MPT's keys have their tokens as the last axis.
    mpt = layer(inputs["key_mpt"].mT, config["mpt"]["start_size"], config["mpt"]["recent_size"])
    mpt.retain(None, 1.0, None)
    outputs = {}
    for name, made in (("call", called), ("evict_for_space_5", before), ("evict_range_3_8", ranged)):
        outputs |= {f"{name}.key": made.keys, f"{name}.value": made.values}
    return outputs | {"mpt.key": mpt.keys.mT, "mpt.value": mpt.values}
