"""SpaRTAN: its mixers, each with both kinds of convolution, and a model."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.spartan import MultiOrderSpatialMixer, WaveChannelMixer
from heedful.models.spartan import SpaRTAN
from tests.parity.harness import Tensors, adapter


@adapter("spartan-smixer", "spartan-smixer-grouped")
def smixer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    depthwise = params["h_conv.conv.weight"].shape[1] == 1
    mixer = MultiOrderSpatialMixer(config["in_dim"], depthwise=depthwise)
    return {"y": authors.load(mixer, params).eval()(inputs["x"])}


@adapter("spartan-cmixer", "spartan-cmixer-grouped")
def cmixer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    depthwise = params["conv.conv.weight"].shape[1] == 1
    mixer = WaveChannelMixer(config["in_dim"], expand=config["expand_ratio"], depthwise=depthwise)
    return {"y": authors.load(mixer, params).eval()(inputs["x"])}


@adapter("spartan-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = SpaRTAN(
        classes=config["num_classes"],
        depths=config["layer_depths"],
        dims=(config["init_dim"], *config["dims"]),
        expand=config["expand_ratios"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
