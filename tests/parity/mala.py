"""MALA: the authors' linear module, whose position tables are inputs of the call, and their model."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.mala import MagnitudeAwareLinearAttention
from heedful.models.mala import MAViT
from tests.parity.harness import Tensors, adapter
from tests.parity.rala import run_backbone


@adapter("mala")
def mala(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MagnitudeAwareLinearAttention(config["dim"], heads=config["num_heads"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("mala-backbone")
def backbone(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return run_backbone(MAViT, config, params, inputs)
