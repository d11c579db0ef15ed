"""MambaOut: the authors' gated CNN block and their model."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.mambaout import GatedCNN
from heedful.models.mambaout import MambaOut
from tests.parity.harness import Tensors, adapter


@adapter("mambaout-block", "mambaout-block-half")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = authors.load(GatedCNN(config["dim"], conv_ratio=config["conv_ratio"]), params).eval()
    x = inputs["x"]
    return {"y": x + mixer(x.movedim(-1, 1)).movedim(1, -1)}


@adapter("mambaout")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = MambaOut(classes=config["num_classes"], depths=config["depths"], dims=config["dims"])
    authors.load(made, params).eval()
    last = made.features(inputs["x"])[-1]
    return {"y": made(inputs["x"]), "features": made.mean(last)}
