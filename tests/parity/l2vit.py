"""L2ViT: the authors' ReLU linear attention, their two blocks and their model."""

from __future__ import annotations

from typing import Any

from torch import nn

from heedful import authors
from heedful.mixers.linear.l2vit import ReLULinearAttention
from heedful.models.l2vit import GlobalBlock, L2ViT, WindowBlock
from tests.parity.harness import Tensors, adapter, with_counters


@adapter("l2vit-linear-attention")
def linear_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = ReLULinearAttention(config["dim"], heads=config["num_heads"], qkv_bias=config["qkv_bias"])
    mixer.load_state_dict(params, strict=True)
    x = inputs["x"]
    return {"y": mixer.eval()(x), "denom_unclamped": mixer.denominators(x)}


def _run_block(block: nn.Module, params: Tensors, inputs: Tensors) -> Tensors:
    x = inputs["x"].transpose(1, 2).unflatten(2, (6, 7))  # the map of the recorded call
    y = authors.load(block, with_counters(params)).eval()(x)
    return {"y": y.flatten(2).transpose(1, 2)}


@adapter("l2vit-lwa-block")
def window_block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim = config["dim"]
    return _run_block(WindowBlock(dim, config["num_heads"], config["window_size"], 4 * dim), params, inputs)


@adapter("l2vit-lga-block")
def global_block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim = config["dim"]
    return _run_block(GlobalBlock(dim, config["num_heads"], 4 * dim), params, inputs)


@adapter("l2vit")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = L2ViT(
        classes=config["num_classes"],
        depths=config["depths"],
        dims=config["dims"],
        heads=config["num_heads"],
        window=config["window_size"],
        mlp_ratio=config["mlp_ratio"][0],
    )
    authors.load(made, with_counters(params)).eval()
    return {"y": made(inputs["x"]), "features": made.pooled(inputs["x"])}
