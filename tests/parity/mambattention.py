"""MambAttention: the authors' block and their model for speech."""

from __future__ import annotations

from typing import Any

from heedful.authors import load
from heedful.mixers.scan.mambattention import MambAttention
from heedful.models.mambattention import MambAttentionModel
from tests.parity.harness import Tensors, adapter


def _arguments(told: dict[str, Any]) -> dict[str, Any]:
    return {"state_dim": told["d_state"], "conv_size": told["d_conv"], "expand": told["expand"]}


@adapter("mambattention-block")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    told = config["model_cfg"]
    mixer = MambAttention(told["hid_feature"], **_arguments(told))
    return {"y": load(mixer, params).eval()(inputs["x"])}


@adapter("mambattention")
def model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    told = config["model_cfg"]
    network = MambAttentionModel(
        told["hid_feature"],
        depth=told["num_tfmamba"],
        bins=config["stft_cfg"]["n_fft"] // 2 + 1,
        ceiling=told["beta"],
        **_arguments(told),
    )
    mag, phase, both = load(network, params).eval()(inputs["mag"], inputs["pha"])
    return {"mag": mag, "pha": phase, "com": both}
