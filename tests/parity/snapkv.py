"""SnapKV: the keys and values a prompt keeps, every query head choosing by itself."""

from __future__ import annotations

from typing import Any

from heedful.cache.snapkv import snapkv_select
from tests.parity.harness import Tensors, adapter


@adapter("snapkv")
def snapkv(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    outputs = {}
    for pooling in config["pooling"]:
        key, value = snapkv_select(
            inputs["query"],
            inputs["key"],
            inputs["value"],
            window=config["window_size"],
            capacity=config["max_capacity_prompt"],
            kernel=config["kernel_size"],
            pooling=pooling.removesuffix("pool"),
        )
        outputs |= {f"{pooling}.key": key, f"{pooling}.value": value}
    return outputs
