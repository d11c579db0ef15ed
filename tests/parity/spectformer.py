"""SpectFormer: the authors' filter and blocks, which take tokens row by row, and their columnar model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from heedful.authors import load
from heedful.mixers.grid.spectformer import SpectralGating
from heedful.models.spectformer import SpectFormer
from heedful.models.spectformer_blocks import ClassBlock, HierarchicalBlock, MapAttention, SpectralBlock
from tests.parity.harness import Tensors, adapter

EPS = 1e-5  # of the norms of a block that is built by itself


def _as_map(run: Callable[[Tensor], Tensor], x: Tensor, height: int) -> Tensor:
    y = run(x.unflatten(1, (height, -1)).movedim(-1, 1))
    return y.movedim(1, -1).flatten(1, 2)


def _run(module: nn.Module, params: Tensors, x: Tensor, height: int) -> Tensors:
    return {"y": _as_map(load(module, params).eval(), x, height)}


@adapter("spectformer-sgn-5x7", "spectformer-sgn-6x6")
def gating(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    x, height = inputs["x"], config["h"]
    return _run(SpectralGating(config["dim"], size=(height, x.shape[1] // height)), params, x, height)


@adapter("spectformer-block")
def spectral_block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    x, height = inputs["x"], config["h"]
    size = (height, x.shape[1] // height)
    block = SpectralBlock(config["dim"], size=size, hidden=4 * config["dim"], eps=EPS)
    return _run(block, params, x, height)


@adapter("spectformer-h-attblock")
def attention_block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim = config["dim"]
    mixer = MapAttention(dim, heads=config["num_heads"])
    block = HierarchicalBlock(dim, mixer, hidden=config["mlp_ratio"] * dim, eps=EPS)
    return _run(block, params, inputs["x"], 5)


@adapter("spectformer-h-classblock")
def class_block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim = config["dim"]
    block = ClassBlock(dim, heads=config["num_heads"], hidden=config["mlp_ratio"] * dim, eps=EPS)
    return {"y": load(block, params).eval()(inputs["x"])}


@adapter("spectformer-vanilla")
def vanilla(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = SpectFormer(
        classes=config["num_classes"],
        dim=config["embed_dim"],
        depth=config["depth"],
        image_size=config["img_size"],
        patch=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
    )
    return {"y": load(made, params).eval()(inputs["x"])}
