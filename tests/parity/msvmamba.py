"""MSVMamba: the authors' mixer with scans of two resolutions, and their model."""

from __future__ import annotations

from typing import Any

from heedful.authors import load
from heedful.mixers.scan.msvmamba import MultiScaleScan2d
from heedful.models.msvmamba import MSVMamba
from tests.parity.harness import Tensors, adapter


@adapter("msvmamba-ms2d", "msvmamba-ms2d-odd")
def mixer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    scan = MultiScaleScan2d(config["d_model"], state_dim=config["d_state"], expand=int(config["ssm_ratio"]))
    return {"y": load(scan, params).eval()(inputs["x"].movedim(-1, 1)).movedim(1, -1)}


@adapter("msvmamba")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = MSVMamba(
        classes=config["num_classes"],
        depths=config["depths"],
        dims=config["dims"],
        state_dim=config["ssm_d_state"],
    )
    x = inputs["x"]
    first = load(made, params).eval().features(x)[0]
    return {
        "y": made(x),
        "block0": first.movedim(1, -1),
        "down0": made.downsample[1](first).movedim(1, -1),
    }
