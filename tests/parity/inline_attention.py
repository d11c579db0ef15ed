"""InLine attention: the authors' modules of Swin, DeiT, PVT and CSwin, and their DeiT."""

from __future__ import annotations

from typing import Any

import torch

from heedful import authors
from heedful.mixers.grid.inline_attention import (
    InLineAttention,
    InLineAttentionCSwin,
    InLineAttentionDeiT,
)
from heedful.models.inline_deit import InLineDeiT
from tests.parity.harness import Tensors, adapter


@adapter(
    "inline-attention-swin-identity",
    "inline-attention-swin-relu",
    "inline-attention-swin-leakyrelu",
    "inline-attention-swin-exp",
)
def swin(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = InLineAttention(config["dim"], heads=config["num_heads"], features=config["kernel_func"])
    mixer.load_state_dict(params, strict=True)
    x = inputs["x"].transpose(1, 2).unflatten(2, tuple(config["window_size"]))
    return {"y": mixer.eval()(x).flatten(2).transpose(1, 2)}


@adapter("inline-attention-deit")
def deit(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = InLineAttentionDeiT(config["dim"], heads=config["num_heads"], qkv_bias=config["qkv_bias"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("inline-attention-pvt")
def pvt(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = InLineAttention(config["dim"], heads=config["num_heads"], qkv_bias=config["qkv_bias"])
    ours = {name: value for name, value in params.items() if name.split(".")[0] not in ("q", "kv")}
    for leaf in ("weight", "bias"):  # separate layers for the queries and for keys and values
        ours[f"qkv.{leaf}"] = torch.cat([params[f"q.{leaf}"], params[f"kv.{leaf}"]])
    mixer.load_state_dict(ours, strict=True)
    x = inputs["x"].transpose(1, 2).unflatten(2, (4, 5))  # the map of the recorded call
    return {"y": mixer.eval()(x).flatten(2).transpose(1, 2)}


@adapter("inline-attention-cswin")
def cswin(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = InLineAttentionCSwin(config["dim"], heads=config["num_heads"])
    renamed = {name.replace("get_v.", "lepe."): value for name, value in params.items()}
    mixer.load_state_dict(renamed, strict=True)
    side = config["resolution"]
    q, k, v = (t.transpose(1, 2).unflatten(2, (side, side)) for t in inputs["qkv"])
    return {"y": mixer.eval()(q, k, v, inputs["x_mean"]).flatten(2).transpose(1, 2)}


@adapter("inline-deit")
def deit_model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = InLineDeiT(
        classes=config["num_classes"],
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        image_size=config["img_size"],
        patch=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
