"""EViT: a block that keeps or fuses tokens, and the whole network."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.models.deit import Block
from heedful.models.evit import ClassWatchingAttention, EViT, reorganising
from heedful.routing.evit import TokenReorganizer
from tests.parity.harness import Tensors, adapter


@adapter("evit-block", "evit-block-fuse")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    dim = config["dim"]
    made = Block(dim, ClassWatchingAttention(dim, heads=config["num_heads"]), 4 * dim, 0.0).eval()
    made.norm1.eps = made.norm2.eps = 1e-5  # those of a block built on its own
    made.load_state_dict({name.replace("attn.", "mixer."): value for name, value in params.items()})
    chooses = TokenReorganizer(keep_rate=config["keep_rate"], fuse=config["fuse_token"])
    y, index = reorganising(made, inputs["x"], chooses)
    assert index is not None
    return {"y": y, "idx": index}


@adapter("evit-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    rates = {layer: rate for layer, rate in enumerate(config["keep_rate"]) if rate < 1}
    made = EViT(
        classes=config["num_classes"],
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        keep_rate=list(rates.values()),
        layers=list(rates),
        fuse=config["fuse_token"],
        image_size=config["img_size"],
        patch=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
    )
    authors.load(made, params).eval()
    kept = {f"idx{number}": index for number, index in enumerate(made.kept(inputs["x"]))}
    return {"y": made(inputs["x"]), **kept}
