"""Bi-level routing attention: the authors' released module and their refactored one."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.grid.attention_lepe import AttentionLePE
from heedful.mixers.grid.biformer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from heedful.models.biformer import BiFormer
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


@adapter("biformer-attention-lepe")
def attention_lepe(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = AttentionLePE(config["dim"], heads=config["num_heads"], lepe_kernel=config["side_dwconv"])
    mixer.load_state_dict(params, strict=True)
    return {"y": mixer.eval()(inputs["x"].movedim(-1, 1)).movedim(1, -1)}


@adapter("biformer-model")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = BiFormer(
        classes=config["num_classes"],
        depths=config["depth"],
        dims=config["embed_dim"],
        head_dim=config["head_dim"],
        topk=config["topks"][:3],
        regions=config["n_win"],
        mlp_ratio=config["mlp_ratios"][0],
    )
    return {"y": authors.load(made, params).eval()(inputs["x"])}
