"""RALA: the authors' linear and softmax modules, whose position tables are inputs of the call."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.rala import RALAVanillaAttention, RankAugmentedLinearAttention
from tests.parity.harness import Tensors, adapter


def _run(kind: type[RankAugmentedLinearAttention], config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = kind(config["dim"], heads=config["num_heads"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("rala")
def rala(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return _run(RankAugmentedLinearAttention, config, params, inputs)


@adapter("rala-vanilla")
def vanilla(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return _run(RALAVanillaAttention, config, params, inputs)
