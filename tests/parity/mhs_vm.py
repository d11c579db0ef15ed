"""MHS-VM, with the selective scan and the Mamba mixer that the vision Mambas share, and the scan routes."""

from __future__ import annotations

from typing import Any

import torch

from heedful.authors import load
from heedful.mixers.scan.mamba import Mamba
from heedful.mixers.scan.mhs_vm import MultiHeadScanGate
from heedful.ops.scan import selective_scan
from heedful.ops.scan_orders import inverse_order, scan_routes
from tests.parity.harness import Tensors, adapter


@adapter("selective-scan")
def operator(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given: dict[str, Any] = {name: inputs[name] for name in names}
    y, last = selective_scan(**given, delta_softplus=config["delta_softplus"], return_state=True)
    return {"y": y, "last_state": last}


@adapter("mamba-simple")
def mixer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mamba = Mamba(
        config["d_model"], state_dim=config["d_state"], conv_size=config["d_conv"], expand=config["expand"]
    )
    return {"y": load(mamba, params).eval()(inputs["x"])}


@adapter("mhs-vm-routes")
def routes(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    """The base routes, without their reverses: C0, C1, X0, X1, S0, S1, Z0, Z1, each with its inverse."""
    found = {}
    for height, width in inputs["hw"].tolist():
        names = ("snake", "diagonal", "spiral", "raster")
        base = torch.cat([scan_routes(name, (height, width))[::2] for name in names])
        found[f"routes_{height}x{width}"] = torch.stack([base, inverse_order(base)], dim=1)
    return found


@adapter("mhs-vm-gate-h3", "mhs-vm-gate-h4")
def gate(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    told = config["para_dict"]
    mixer = MultiHeadScanGate(
        config["d_model"],
        heads=told["head_num"],
        state_dim=config["d_state"],
        threshold=told["gfu_t"],
    )
    load(mixer, params).eval()
    y = mixer(inputs["x"].movedim(-1, 1)).movedim(1, -1)
    return {"y": y, "mhs": mixer.scan(inputs["x_mhs"]).movedim(1, -1)}
