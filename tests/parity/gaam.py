"""GAAM: the authors' block of two layers, and one head with padding."""

from __future__ import annotations

from typing import Any

import torch

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
    stacked = {}
    for layer, heads in enumerate(config["num_heads"]):
        for ours, theirs in (("offsets", "mean_offsets"), ("widths", "c")):
            stacked[f"layers.{layer}.{ours}"] = torch.stack(
                [params[f"layers.{layer}.attention_heads.{head}.{theirs}"] for head in range(heads)]
            )
    block.load_state_dict(stacked, strict=True)
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
    mixer.load_state_dict({"offsets": params["mean_offsets"][None], "widths": params["c"][None]}, strict=True)
    return {"y": mixer(inputs["x"]), "w": mixer.weights(inputs["x"])}
