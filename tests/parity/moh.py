"""Mixture-of-head attention: the authors' DiT, LLaMA and TransNeXt attentions."""

from __future__ import annotations

from typing import Any

import heedful
from heedful.mixers.heads.moh import MixtureOfHeadAttention
from heedful.mixers.heads.moh_llama import MixtureOfHeadLlamaAttention
from heedful.mixers.heads.moh_vit import MixtureOfHeadAggregatedAttention, MixtureOfHeadVisionAttention
from heedful.models.moh_dit import MoHDiT
from tests.parity.harness import Tensors, adapter


@adapter("moh-dit", "moh-dit-shared", "moh-dit-routed")
def moh_dit(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MixtureOfHeadAttention(
        config["dim"],
        heads=config["num_heads"],
        shared_heads=config["shared_head"],
        routed_heads=config["routed_head"],
        head_dim=config.get("head_dim"),
        qk_norm=config.get("qk_norm", False),
        qkv_bias=config["qkv_bias"],
    ).eval()
    return {"y": heedful.authors.load(mixer, params)(inputs["x"])}


@adapter("moh-llama-attention")
def moh_llama(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MixtureOfHeadLlamaAttention(
        config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        rotary_base=config["rope_theta"],
    ).eval()
    return {"y": heedful.authors.load(mixer, params)(inputs["x"])}


def on_tokens(mixer: Any, config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    """The authors give tokens in rows; the given table and index are those that the mixer computes."""
    heedful.authors.load(mixer.eval(), params)
    x = inputs["x"].mT.unflatten(2, tuple(config["input_resolution"]))
    return {"y": mixer(x).flatten(2).mT}


@adapter("moh-vit-attention")
def moh_vit(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MixtureOfHeadVisionAttention(
        config["dim"],
        heads=config["num_heads"],
        shared_heads=config["shared_head"],
        routed_heads=config["routed_head"],
    )
    return on_tokens(mixer, config, params, inputs)


@adapter("moh-vit-aggregated")
def moh_vit_aggregated(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = MixtureOfHeadAggregatedAttention(
        config["dim"],
        heads=config["num_heads"],
        shared_heads=config["shared_head"],
        routed_heads=config["routed_head"],
        window=config["window_size"],
        pool_ratio=config["sr_ratio"],
    )
    return on_tokens(mixer, config, params, inputs)


@adapter("moh-dit-model")
def moh_dit_model(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    (head_dim,) = set(config["head_dim"])
    model = MoHDiT(
        dim=config["hidden_size"],
        heads=[(h, 1) for h in config["num_heads"]],
        shared_heads=[(h, 1) for h in config["shared_head"]],
        routed_heads=[(h, 1) for h in config["routed_head"]],
        head_dim=head_dim,
        size=config["input_size"],
        in_channels=config["in_channels"],
        patch=config["patch_size"],
        classes=config["num_classes"],
        learn_sigma=config["learn_sigma"],
        mlp_ratio=config["mlp_ratio"],
    ).eval()
    return {"y": heedful.authors.load(model, params)(inputs["x"], inputs["t"], inputs["labels"])}
