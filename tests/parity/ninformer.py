"""NiNformer: the authors' model."""

from __future__ import annotations

from typing import Any

from heedful.authors import load
from heedful.models.ninformer import NiNformer
from tests.parity.harness import Tensors, adapter


@adapter("ninformer")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    network = NiNformer(
        config["d_model"],
        depth=config["num_layers"],
        length=config["seq_len"],
        hidden=config["d_ffn"],
        dropout=config["dropout"],
    )
    return {"y": load(network, params).eval()(inputs["x"])}
