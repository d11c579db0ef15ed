"""ChAda-ViT: the model, and its layer."""

from __future__ import annotations

from typing import Any

import torch

from heedful import authors
from heedful.models.chada_vit import ChAdaLayer, ChAdaViT
from tests.parity.harness import Tensors, adapter


@adapter("chada-vit-layer")
def layer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = ChAdaLayer(config["d_model"], heads=config["nhead"], hidden=config["dim_feedforward"])
    authors.load(made, params).eval()
    seen = ~inputs["src_key_padding_mask"]
    return {"out": made(inputs["src"], seen), "attn": made.attention_maps(inputs["src"], seen)}


def _counts(config: Any, drawn: Tensors) -> Tensors:
    """Numbers of channels that add up."""
    return {
        **drawn,
        "list_num_channels": torch.tensor([3, 1, 4]),
        "list_num_channels_hi": torch.tensor([2, 3]),
    }


@adapter("chada-vit", inputs=_counts)
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = ChAdaViT(
        max_channels=config["max_number_channels"],
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        hidden=params["blocks.0.linear1.weight"].shape[0],
        image_size=config["img_size"][0],
        patch=config["patch_size"],
    )
    authors.load(made, params).eval()
    x, counts = inputs["x"], inputs["list_num_channels"]
    return {
        "cls": made(x, counts),
        "all_tokens": made.patch_tokens(x, counts),
        "cls_hi": made(inputs["x_hi"], inputs["list_num_channels_hi"]),
    }
