"""Bi-level routing attention: the authors' released module and their refactored one."""

from __future__ import annotations

from typing import Any

from heedful.mixers.grid.biformer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from tests.parity.harness import Tensors, adapter

_LEGACY = {"qkv.qkv": "qkv", "wo": "out", "lepe": "lepe"}
_NCHW = {"qkv_linear": "qkv", "output_linear": "out", "lepe": "lepe"}


def _load(
    kind: type[BiLevelRoutingAttention], config: Any, params: Tensors, names: dict[str, str]
) -> BiLevelRoutingAttention:
    mixer = kind(
        config["dim"],
        heads=config["num_heads"],
        regions=config["n_win"],
        topk=config["topk"],
        lepe_kernel=config["side_dwconv"],
    )
    renamed = {}
    for name, value in params.items():
        module, leaf = name.rsplit(".", 1)
        if module.endswith("_linear") and leaf == "weight":
            value = value[:, :, 0, 0]  # a 1x1 convolution
        renamed[f"{names[module]}.{leaf}"] = value
    mixer.load_state_dict(renamed, strict=True)
    return mixer.eval()


@adapter("biformer-bra", "biformer-bra-autopad")
def legacy(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = _load(BiLevelRoutingAttention, config, params, _LEGACY)
    x = inputs["x"].movedim(-1, 1)
    return {"y": mixer(x).movedim(1, -1), "route_idx": mixer.route(x)}


@adapter("biformer-bra-nchw", "biformer-bra-nchw-odd")
def nchw(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return {"y": _load(NCHWBiLevelRoutingAttention, config, params, _NCHW)(inputs["x"])}
