"""MALA: the authors' linear module, whose position tables are inputs of the call."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.mala import MagnitudeAwareLinearAttention
from tests.parity.harness import Tensors, adapter


@adapter("mala")
def mala(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MagnitudeAwareLinearAttention(config["dim"], heads=config["num_heads"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}
