"""MaxViT: relative attention of one window, a block of either stride, and a model; TensorFlow layouts."""

from __future__ import annotations

import math
from typing import Any

from heedful import authors
from heedful.authors.maxvit import tensorflow
from heedful.mixers.grid.maxvit import MultiAxisAttention
from heedful.models.maxvit import Block, MaxViT
from tests.parity.harness import Tensors, adapter


@adapter("maxvit-attention")
def attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim, x = config["hidden_size"], inputs["x"]
    side = math.isqrt(x.shape[1])
    mixer = MultiAxisAttention(dim, head_dim=config["head_size"], size=side)
    ours = tensorflow({f"block/{name}": value for name, value in params.items()})
    mixer.load_state_dict({n.removeprefix("attn_block.mixer."): t for n, t in ours.items()}, strict=True)
    y = mixer.eval()(x.mT.unflatten(2, (side, side)))
    return {"y": y.flatten(2).mT}


@adapter("maxvit-block-s1", "maxvit-block-s2")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = Block(
        inputs["x"].shape[-1],
        config["hidden_size"],
        stride=config["pool_stride"],
        head_dim=config["head_size"],
        window=config["window_size"],
        grid=config["grid_size"],
    )
    authors.load(made, params).eval()
    mbconv = made.conv(inputs["x"].movedim(-1, 1))
    attended = mbconv + made.attn_block.mixer(made.attn_block.norm1(mbconv))
    y = made.attn_grid(made.attn_block(mbconv))
    return {name: t.movedim(1, -1) for name, t in (("mbconv", mbconv), ("block_attn", attended), ("y", y))}


@adapter("maxvit-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = MaxViT(
        classes=config["num_classes"],
        depths=config["num_blocks"],
        dims=config["hidden_size"],
        stem=config["stem_hsize"][0],
        head_dim=config["head_size"],
        window=config["window_size"],
        grid=config["grid_size"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"].movedim(-1, 1))}
