"""Mono-InternVL 1.0: one decoder layer with a feed-forward expert for visual tokens."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.heads.mono_internvl import ModalityExpertLayer
from tests.parity.harness import Tensors, adapter


def tokens_of_both_kinds(config: Any, drawn: Tensors) -> Tensors:
    """The mask holds zeros and ones."""
    return drawn | {"visual_token_mask": (drawn["visual_token_mask"] > 0).to(drawn["x"].dtype)}


@adapter("mono-internvl-layer", inputs=tokens_of_both_kinds)
def mono_internvl_layer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = ModalityExpertLayer(
        config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        hidden=config["intermediate_size"],
        rotary_base=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    ).eval()
    authors.load(mixer, params)
    return {"y": mixer(inputs["x"], visual=inputs["visual_token_mask"][..., 0] > 0.5)}
