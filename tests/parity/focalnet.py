"""Focal modulation; the authors' module has the channels last."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.focalnet import FocalModulation
from tests.parity.harness import Tensors, adapter


@adapter("focalnet-modulation", "focalnet-modulation-norm-postln")
def modulation(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = FocalModulation(
        config["dim"],
        levels=config["focal_level"],
        window=config["focal_window"],
        normalize_modulator=config.get("normalize_modulator", False),
        postln=config.get("use_postln_in_modulation", False),
    )
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"].movedim(-1, 1)).movedim(1, -1)}
