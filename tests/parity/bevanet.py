"""BEVANet: its attentions, selection of kernels, block, pyramid pooling and fusions."""

from __future__ import annotations

from typing import Any

from torch import nn

from heedful import authors
from heedful.mixers.grid.bevanet import (
    ComprehensiveKernelSelection,
    LargeSeparableKernelAttention,
    SparseDecomposedLargeSeparableKernelAttention,
)
from heedful.models.bevanet_parts import (
    BoundaryGuidedFusion,
    EVABlock,
    PixelAttentionFusion,
    PyramidPooling,
)
from tests.parity.harness import Tensors, adapter, with_counters


def loaded(module: nn.Module, params: Tensors) -> nn.Module:
    return authors.load(module, with_counters(params)).eval()


@adapter("bevanet-lska23")
def lska(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = LargeSeparableKernelAttention(config["dim"], kernel=config["kernel_size"])
    return {"y": loaded(mixer, params)(inputs["x"])}


@adapter("bevanet-sdlska11", "bevanet-sdlska35")
def sdlska(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = SparseDecomposedLargeSeparableKernelAttention(config["dim"], kernel=config["kernel_size"])
    return {"y": loaded(mixer, params)(inputs["x"])}


@adapter("bevanet-cks")
def cks(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = loaded(ComprehensiveKernelSelection(config["dim"]), params)
    return {"y": made(inputs["small"], inputs["big_h"], inputs["big_v"])}


@adapter("bevanet-evan")
def evan(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = EVABlock(config["dim"], kernel=config["kernel_size"], mlp_ratio=config["mlp_expand"])
    return {"y": loaded(made, params)(inputs["x"])}


@adapter("bevanet-dlkppm")
def dlkppm(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = PyramidPooling(config["inplanes"], config["branch_planes"], config["outplanes"])
    return {"y": loaded(made, params)(inputs["x"])}


@adapter("bevanet-bgaf")
def bgaf(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = loaded(BoundaryGuidedFusion(config["in_channels"], config["out_channels"]), params)
    return {"y": made(inputs["p"], inputs["i"], inputs["d"])}


@adapter("bevanet-pagfm")
def pagfm(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = loaded(PixelAttentionFusion(config["in_channels"], config["mid_channels"]), params)
    return {"y": made(inputs["x"], inputs["y"])}
