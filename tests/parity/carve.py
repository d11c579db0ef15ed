"""Contrastive attention: fusion, masks and box."""

from __future__ import annotations

from typing import Any

import torch

from heedful.steer.carve import bounding_box, fuse_contrast, region_mask
from tests.parity.harness import Tensors, adapter


@adapter("carve")
def carve(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    how = {
        "grid": tuple(config["grid"]),
        "size": tuple(config["image_size_wh"]),
        "layers": config["layers"],
        "ridge": config["lam"],
    }
    maps = inputs["query_maps"], inputs["general_maps"]
    fused = fuse_contrast(*maps, **how)
    made = {"fused_all": fused, "fused_first": fuse_contrast(*maps, first_step=True, **how)}
    for name, rank in (("attention_sum", "attention"), ("size", "size"), ("remove_small", "large")):
        mask = region_mask(fused, share=config["top_percent"], regions=config["min_keep_regions"], rank=rank)
        made[f"mask_{name}"] = mask.astype("uint8")
    made["bbox"] = torch.tensor(bounding_box(made["mask_attention_sum"] > 0)).numpy()
    return {name: torch.from_numpy(value) for name, value in made.items()}
