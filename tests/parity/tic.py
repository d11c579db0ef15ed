"""MSA-Conv: the layer, its attention weights and what they give."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.tic import MSAConv2d
from tests.parity.harness import Tensors, adapter


@adapter("tic-msaconv", "tic-msaconv-dilated")
def msaconv(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MSAConv2d(
        config["input_channel"],
        dim_out=config["output_channel"],
        kernel_size=config["kernel_size"],
        dilation=config.get("dilation", 1),
        stride=config["stride"],
    )
    authors.load(mixer, params).eval()
    attended, weights = mixer.attend(inputs["x"])
    return {"y": mixer(inputs["x"]), "attn": weights[:, 0], "att_out": attended}
