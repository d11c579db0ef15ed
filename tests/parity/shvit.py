"""Single-head self-attention of SHViT."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.shvit import SingleHeadPartialAttention
from tests.parity.harness import Tensors, adapter


@adapter("shvit-shsa")
def shsa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = SingleHeadPartialAttention(config["dim"], partial_dim=config["pdim"], qk_dim=config["qk_dim"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"])}
