"""DuoFormer: a block among scales, and the network on the tokens of cells."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.models.deit import Block, DenseAttention
from heedful.models.duoformer import MultiscaleFormer
from tests.parity.harness import Tensors, adapter


@adapter("duoformer-scale-block")
def scale_block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim, x = config["dim"], inputs["x"]
    attention = DenseAttention(dim, heads=config["num_heads"])
    block = Block(dim, attention, int(config["mlp_ratio"] * dim), 0.0).eval()
    block.norm1.eps = block.norm2.eps = 1e-5  # those of a block built on its own
    block.load_state_dict({name.replace("attn.", "mixer."): value for name, value in params.items()})
    return {"y": block(x.flatten(0, 1)).unflatten(0, x.shape[:2])}


@adapter("duoformer-former")
def former(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = MultiscaleFormer(
        config["embed_dim"],
        scales=config["scales"],
        classes=config["num_classes"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
