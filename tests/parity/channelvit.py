"""ChannelViT: the plain class, and the one with channel sampling."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.models.channelvit import ChannelViT
from tests.parity.harness import Tensors, adapter


def _build(config: Any, params: Tensors) -> ChannelViT:
    model = ChannelViT(
        in_channels=config["in_chans"],
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        image_size=config["img_size"][0],
        patch=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
    )
    return authors.load(model, params).eval()


@adapter("channelvit")
def plain(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    model = _build(config, params)
    # This class of the authors takes the identities of the first sample for all.
    return {
        "cls": model(inputs["x"], inputs["channels"][0]),
        "cls_hi": model(inputs["x_hi"], inputs["channels_hi"][0]),
        "pos16x16_3ch": model.position_table(3, (4, 4)),
    }


@adapter("channelvit-hcs")
def sampling(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return {"cls": _build(config, params)(inputs["x"], inputs["channels"])}
