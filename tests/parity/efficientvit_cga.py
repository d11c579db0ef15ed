"""EfficientViT: cascaded group attention of a whole map, and in windows."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.efficientvit_cga import CascadedGroupAttention
from tests.parity.harness import Tensors, adapter


@adapter("efficientvit-cga", "efficientvit-cga-window")
def cga(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = CascadedGroupAttention(
        config["dim"],
        heads=config["num_heads"],
        key_dim=config["key_dim"],
        window=config.get("window_resolution", config["resolution"]),
        kernels=config["kernels"],
    )
    params = {name.removeprefix("attn."): array for name, array in params.items()}
    del params["attention_bias_idxs"]  # places in the table, which heedful computes
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}
