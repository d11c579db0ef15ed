"""A2Mamba: the authors' mixers, whose position tables are inputs of the call, and their neighborhoods."""

from __future__ import annotations

from typing import Any

from heedful.authors import load
from heedful.mixers.scan.a2mamba import (
    A2MambaGlobalAttention,
    AttentionAugmentedSSM,
    MultiScaleAttentionAugmentedSSM,
)
from heedful.ops.neighborhood import NeighborhoodMap, neighbors
from tests.parity.harness import Tensors, adapter


def _completed(mixer: MultiScaleAttentionAugmentedSSM, params: Tensors) -> Tensors:
    """The file leaves out the counter of the batch norm, which holds nothing learned."""
    counter = "num_batches_tracked"
    return {**params, f"gate.1.{counter}": mixer.state_dict()[f"gate_norm.{counter}"]}


@adapter("a2mamba-mass", "a2mamba-mass-h4")
def mass(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MultiScaleAttentionAugmentedSSM(
        config["embed_dim"], heads=config["num_heads"], window=config["window_size"]
    )
    return {"y": load(mixer, _completed(mixer, params)).eval()(inputs["x"])}


@adapter("a2mamba-global")
def whole(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    height, width = config["image_size"]
    mixer = A2MambaGlobalAttention(
        config["embed_dim"], heads=config["num_heads"], window=config["window_size"], size=(height, width)
    )
    return {"y": load(mixer, _completed(mixer, params)).eval()(inputs["x"])}


@adapter("a2mamba-a2ssm-noattn")
def scan(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    ssm = AttentionAugmentedSSM(config["d_model"], heads=config["num_heads"])
    return {"y": load(ssm, params).eval()(inputs["x"])}


@adapter("a2mamba-na2d")
def neighborhood(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    q, k, v = (inputs[name] for name in "qkv")
    size = (q.shape[2], q.shape[3])
    window, (d_rows, d_columns) = config["kernel_size"], config["dilation"]
    near = NeighborhoodMap(size, (window, window), (d_rows, d_columns))
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    logits = near.logits(q, k) + near.bias(inputs["rpb"])
    o = near.average(logits.softmax(-1), v)
    index, offset = neighbors(7, 3, 2)
    return {
        "logits": logits.unflatten(2, size),
        "o": o.unflatten(2, size),
        "index_7_3_2": index,
        "rpbindex_7_3_2": offset + window - 1,
    }
