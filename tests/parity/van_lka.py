"""Large kernel attention."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.van_lka import LargeKernelAttention
from tests.parity.harness import Tensors, adapter


@adapter("van-lka")
def lka(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = LargeKernelAttention(config["dim"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}
