"""FocalNet: focal modulation, whose authors' module has the channels last, and the model."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.focalnet import FocalModulation
from heedful.models.focalnet import FocalNet
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


@adapter("focalnet-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = FocalNet(
        classes=config["num_classes"],
        depths=config["depths"],
        dims=[config["embed_dim"] * 2**stage for stage in range(len(config["depths"]))],
        levels=config["focal_levels"],
        window=config["focal_windows"][0],
        mlp_ratio=config["mlp_ratio"],
        conv_embed=config["use_conv_embed"],
        postln=config["use_postln"],
        layer_scale=1e-4 if config["use_layerscale"] else None,
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
