"""GAAM: the authors' block of two layers, and one head with padding."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.heads.gaam import GaussianAdaptiveAttention, GaussianBlock
from tests.parity.harness import Tensors, adapter


@adapter("gaam")
def gaam(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    block = GaussianBlock(
        *(
            GaussianAdaptiveAttention(
                inputs["x"].shape[2],
                heads=heads,
                gaussians=gaussians,
                norm_axis=axis,
                padding_value=config["padding_value"],
            )
            for axis, heads, gaussians in zip(
                config["norm_axes"], config["num_heads"], config["num_gaussians"], strict=True
            )
        )
    ).eval()
    authors.load(block, params)
    details, x = {}, inputs["x"]
    for number, layer in enumerate(block.layers):
        details[f"details_layer_{number}"] = layer.weights(x)
        x = layer(x) + x
    return {"y": block(inputs["x"]), **details}


@adapter("gaam-padding")
def gaam_padding(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = GaussianAdaptiveAttention(
        inputs["x"].shape[2],
        heads=config["num_heads"],
        gaussians=config["num_gaussians"],
        norm_axis=config["norm_axis"] % inputs["x"].ndim,
        padding_value=config["padding_value"],
    ).eval()
    authors.load(mixer, {f"attention_heads.0.{name}": a for name, a in params.items()})
    return {"y": mixer(inputs["x"]), "w": mixer.weights(inputs["x"])}
