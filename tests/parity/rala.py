"""RALA: the authors' linear and softmax modules, whose position tables are inputs of the call, and RAVLT."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.rala import RALAVanillaAttention, RankAugmentedLinearAttention
from heedful.models.rala import RAVLT
from tests.parity.harness import Tensors, adapter, with_counters


def _run(kind: type[RankAugmentedLinearAttention], config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = kind(config["dim"], heads=config["num_heads"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}


@adapter("rala")
def rala(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return _run(RankAugmentedLinearAttention, config, params, inputs)


@adapter("rala-vanilla")
def vanilla(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return _run(RALAVanillaAttention, config, params, inputs)


def run_backbone(kind: type[RAVLT], config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = kind(
        classes=config["num_classes"],
        depths=config["depths"],
        dims=config["embed_dims"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratios"][0],
        projection=config["projection"],
    )
    model = authors.load(made, with_counters(params)).eval()
    x = inputs["x"]
    stem = model.downsample[0](x)
    return {
        "y": model(x),
        "patch_embed": stem,
        "layer0": model.downsample[1](model.stages[0](stem)),
        "features": model.pooled(x)[..., None, None],
    }


@adapter("rala-backbone")
def backbone(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return run_backbone(RAVLT, config, params, inputs)
