"""ECA: the authors' layer and its variant without weight sharing."""

from __future__ import annotations

from typing import Any

from heedful.mixers.channel.eca import ECA, ECANS
from tests.parity.harness import Tensors, adapter


def _run(kind: type[ECA], config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = kind(config["channel"], kernel=config["k_size"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("eca")
def eca(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return _run(ECA, config, params, inputs)


@adapter("eca-ns")
def eca_ns(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return _run(ECANS, config, params, inputs)
