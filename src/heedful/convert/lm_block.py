"""A block out of a pretrained language model, as a layer of a visual encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from heedful.mixers.heads.frozen_lm_block import FrozenLMBlock
from heedful.registry import register

_NAMES = {
    "norm1": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@register("take-lm-block", kind="convert", paper="frozen-lm-block", tags=("pretrained", "surgery"))
def frozen_lm_block(model: nn.Module, dim: int, *, layer: int = -1, frozen: bool = True) -> FrozenLMBlock:
    """A `FrozenLMBlock` for tokens of width `dim`, with a copy of one layer of a Hugging Face model.

    model   a language model of the Llama kind, without biases (llama, mistral)
    dim     channels of the visual encoder
    layer   which layer, counted from the end where negative
    frozen  the copy does not learn

    The final norm starts at ones, as published, not as that of the language model.
    Raises ValueError if the layer has parameters that the block has not, or lacks some.
    Source: Frozen Transformers in Language Models Are Effective Visual Encoder Layers, arXiv 2310.12973.
    """
    config: Any = model.config
    layers = getattr(getattr(model, "model", model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"model is a {type(model).__name__}, must be a language model of the Llama kind")
    theirs = layers[layer].state_dict()
    wanted = {f"{ours}.weight": f"{name}.weight" for ours, name in _NAMES.items()}
    if odd := sorted(theirs.keys() ^ set(wanted.values())):
        raise ValueError(f"model is a {type(model).__name__}, its layers differ in {', '.join(odd)}")
    like = theirs["self_attn.q_proj.weight"]
    made = FrozenLMBlock(
        dim,
        lm_dim=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        hidden=config.intermediate_size,
        frozen=frozen,
        eps=config.rms_norm_eps,
        device=like.device,
        dtype=like.dtype,
    )
    with torch.no_grad():
        made.blocks[0].load_state_dict({ours: theirs[name] for ours, name in wanted.items()}, strict=True)
    return made
