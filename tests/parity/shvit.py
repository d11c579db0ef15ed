"""SHViT: its single-head attention and the model."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.shvit import SingleHeadPartialAttention
from heedful.models.shvit import SHViT
from tests.parity.harness import Tensors, adapter


@adapter("shvit-shsa")
def shsa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = SingleHeadPartialAttention(config["dim"], partial_dim=config["pdim"], qk_dim=config["qk_dim"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("shvit-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    partial_dims = [
        dim if kind == "s" else 0 for dim, kind in zip(config["partial_dim"], config["types"], strict=True)
    ]
    made = SHViT(
        classes=config["num_classes"],
        depths=config["depth"],
        dims=config["embed_dim"],
        partial_dims=partial_dims,
        qk_dim=config["qk_dim"][0],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
