"""TransNeXt: its two attentions, its feed-forward net, and the whole network."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.conv_glu import ConvGLU
from heedful.mixers.grid.transnext import AggregatedAttention, GlobalCosineAttention
from heedful.models.transnext import TransNeXt
from tests.parity.harness import Tensors, adapter


def on_tokens(mixer: Any, params: Tensors, x: Any, size: tuple[int, int]) -> Tensors:
    """The authors give tokens in rows; their index and table are what the mixer computes itself."""
    authors.load(mixer.eval(), params)
    return {"y": mixer(x.mT.unflatten(2, size)).flatten(2).mT}


@adapter("transnext-attention")
def attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = GlobalCosineAttention(
        config["dim"], heads=config["num_heads"], qkv_bias=config["qkv_bias"], trained_size=(3, 3)
    )
    return on_tokens(mixer, params, inputs["x"], tuple(config["input_resolution"]))


@adapter("transnext-aggregated-attention")
def aggregated(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = AggregatedAttention(
        config["dim"],
        heads=config["num_heads"],
        window=config["window_size"],
        pool_ratio=config["sr_ratio"],
        qkv_bias=config["qkv_bias"],
    )
    return on_tokens(mixer, params, inputs["x"], tuple(config["input_resolution"]))


@adapter("transnext-convglu")
def convglu(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = ConvGLU(config["in_features"], hidden=config["hidden_features"])
    return on_tokens(mixer, params, inputs["x"], (4, 5))


@adapter("transnext-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = TransNeXt(
        classes=config["num_classes"],
        depths=config["depths"],
        dims=config["embed_dims"],
        heads=config["num_heads"],
        pool_ratios=config["sr_ratios"],
        window=config["window_size"][0],
        mlp_ratios=config["mlp_ratios"],
        trained_size=config["img_size"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
