"""EfficientViT: cascaded group attention of a whole map and in windows, and the model."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.efficientvit_cga import CascadedGroupAttention
from heedful.models.efficientvit_cga import EfficientViT
from tests.parity.harness import Tensors, adapter


@adapter("efficientvit-cga", "efficientvit-cga-window")
def cga(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = CascadedGroupAttention(
        config["dim"],
        heads=config["num_heads"],
        key_dim=config["key_dim"],
        window=config.get("window_resolution", config["resolution"]),
        kernels=config["kernels"],
    )
    return {"y": authors.load(mixer, params).eval()(inputs["x"])}


@adapter("efficientvit-cga-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = EfficientViT(
        classes=config["num_classes"],
        depths=config["depth"],
        dims=config["embed_dim"],
        heads=config["num_heads"],
        key_dim=config["key_dim"][0],
        kernels=config["kernels"],
        window=config["window_size"][0],
        image_size=config["img_size"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
