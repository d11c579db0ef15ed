"""A2Mamba: the authors' mixers, whose position tables are inputs, their neighborhoods and their model."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.authors import load
from heedful.mixers.scan.a2mamba import (
    A2MambaGlobalAttention,
    AttentionAugmentedSSM,
    MultiScaleAttentionAugmentedSSM,
)
from heedful.models.a2mamba import A2Mamba
from heedful.ops.neighborhood import NeighborhoodMap, neighbors
from tests.parity.harness import Tensors, adapter, with_counters


@adapter("a2mamba-mass", "a2mamba-mass-h4")
def mass(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MultiScaleAttentionAugmentedSSM(
        config["embed_dim"], heads=config["num_heads"], window=config["window_size"]
    )
    return {"y": load(mixer, with_counters(params)).eval()(inputs["x"])}


@adapter("a2mamba-global")
def whole(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    height, width = config["image_size"]
    mixer = A2MambaGlobalAttention(
        config["embed_dim"], heads=config["num_heads"], window=config["window_size"], size=(height, width)
    )
    return {"y": load(mixer, with_counters(params)).eval()(inputs["x"])}


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


@adapter("a2mamba")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    scaled = [a or b for a, b in zip(config["layerscales"], config["resscales"], strict=True)]
    made = A2Mamba(
        classes=config["num_classes"],
        depths=config["depths"],
        dims=config["embed_dims"],
        heads=config["num_heads"],
        windows=config["window_size"],
        mlp_ratios=config["mlp_ratios"],
        projection=config["projection"],
        scale=[1.0 if stage else None for stage in scaled],
        scale_path=["trunk" if stage else "branch" for stage in config["resscales"]],
        image_size=config["image_size"],
    )
    authors.load(made, with_counters(params)).eval()
    maps = made.features(inputs["x"])
    return {"y": made(inputs["x"]), **{f"stage{i}": y for i, y in enumerate(maps)}}
