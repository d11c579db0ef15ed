"""Frozen LM block: the last block of a small LLaMA between its two maps."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.mixers.heads.frozen_lm_block import FrozenLMBlock
from tests.parity.harness import Tensors, adapter


@adapter("frozen-lm-block")
def block(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = FrozenLMBlock(
        inputs["tokens"].shape[-1],
        lm_dim=config["dim"],
        heads=config["n_heads"],
        hidden=config["multiple_of"] * -(-int(8 * config["dim"] / 3) // config["multiple_of"]),
        layers=config["n_layers"] - config["first_layer"],
        eps=config["norm_eps"],
    )
    authors.load(mixer, params).eval()
    mapped = mixer.enter(inputs["tokens"])
    return {"mapped": mapped, "llama_out": mixer.language(mapped), "out": mixer(inputs["tokens"])}
