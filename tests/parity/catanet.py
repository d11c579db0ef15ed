"""CATANet: a step of the centres, both mixers in eval and training, and whole models."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.catanet import LocalRegionSelfAttention, TokenAggregationBlock
from heedful.models.catanet import CATANet
from heedful.routing.centres import next_centres
from tests.parity.harness import Tensors, adapter


@adapter("catanet-center-iter")
def centre_step(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return {"y": next_centres(inputs["x"], inputs["means"])}


def block(config: Any, params: Tensors) -> TokenAggregationBlock:
    mixer = TokenAggregationBlock(
        config["dim"],
        heads=config["heads"],
        qk_dim=config["qk_dim"],
        mlp_dim=config["mlp_dim"],
        centres=config["num_tokens"],
        group_size=config["group_size"],
        iterations=config["n_iter"],
        decay=config.get("ema_decay", 0.999),
    )
    return authors.load(mixer, params)


@adapter("catanet-tab", "catanet-tab-onegroup", "catanet-tab-uninit")
def tab(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return {"y": block(config, params).eval()(inputs["x"])}


@adapter("catanet-tab-train")
def tab_train(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = block(config, params).train()
    return {"y": mixer(inputs["x"]), "means_after": mixer.centres}


@adapter("catanet-lrsa")
def lrsa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = LocalRegionSelfAttention(
        config["dim"], patch=6, heads=config["heads"], qk_dim=config["qk_dim"], mlp_dim=config["mlp_dim"]
    )
    return {"y": authors.load(mixer, params).eval()(inputs["x"])}


@adapter("catanet-model-x2", "catanet-model-x4")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    setting = config["setting"]
    made = CATANet(
        scale=config["upscale"],
        dim=setting["dim"],
        heads=setting["heads"],
        qk_dim=setting["qk_dim"],
        mlp_dim=setting["mlp_dim"],
        centres=config["num_tokens"],
        group_sizes=config["group_size"],
        patch_sizes=setting["patch_size"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
