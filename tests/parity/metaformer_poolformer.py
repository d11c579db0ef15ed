"""PoolFormer's pooling mixer."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.metaformer_poolformer import PoolMixer
from tests.parity.harness import Tensors, adapter


@adapter("poolformer-pooling")
def pooling(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    x = inputs["x"]
    mixer = PoolMixer(x.shape[1], pool=config["pool_size"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(x)}
