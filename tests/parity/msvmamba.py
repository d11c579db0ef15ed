"""MSVMamba: the authors' mixer with scans of two resolutions."""

from __future__ import annotations

from typing import Any

from heedful.authors import load
from heedful.mixers.scan.msvmamba import MultiScaleScan2d
from tests.parity.harness import Tensors, adapter


@adapter("msvmamba-ms2d", "msvmamba-ms2d-odd")
def mixer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    scan = MultiScaleScan2d(config["d_model"], state_dim=config["d_state"], expand=int(config["ssm_ratio"]))
    return {"y": load(scan, params).eval()(inputs["x"].movedim(-1, 1)).movedim(1, -1)}
