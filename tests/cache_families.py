"""Tiny models of several families, from their configurations, for tests of caches."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

import heedful.hf  # noqa: F401  registers the attention implementation

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, Any] = {
    "llama": lambda **c: hf.LlamaConfig(**GROUPED | c),
    "qwen2": lambda **c: hf.Qwen2Config(**GROUPED | c),
    "mistral": lambda **c: hf.MistralConfig(**GROUPED | {"sliding_window": None} | c),
    "gemma": lambda **c: hf.GemmaConfig(**GROUPED | {"head_dim": 8} | c),
    "gpt-neox": lambda **c: hf.GPTNeoXConfig(**SIZES | c),
}
# Families whose layers are of two kinds.
MIXED: dict[str, Any] = {
    "gemma3": lambda **c: hf.Gemma3TextConfig(**GROUPED | {"head_dim": 8} | c),
    "gpt-oss": lambda **c: hf.GptOssConfig(
        **GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1} | c
    ),
}


def made(family: str = "llama", *, implementation: str = "heedful", **changes: Any) -> hf.PreTrainedModel:
    """A model with random weights, large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config((FAMILIES | MIXED)[family](**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        table = model.get_input_embeddings().weight
        table[0] = torch.randn_like(table[0]) / 10  # the padding token: zero, it would attend to all alike
    model.set_attn_implementation(implementation)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 37, (rows, length), generator=torch.Generator().manual_seed(seed))


def stepwise(model: hf.PreTrainedModel, ids: torch.Tensor, cache: hf.Cache, first: int) -> torch.Tensor:
    """Logits of the tokens from `first` on, fed one by one after a prompt."""
    with torch.no_grad():
        model(ids[:, :first], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, ids.shape[1])]
    return torch.cat(steps, dim=1)


def qwen2_vl() -> tuple[hf.PreTrainedModel, dict[str, torch.Tensor]]:
    """A Qwen2-VL with an image of 4 tokens amid the text, and its inputs."""
    torch.manual_seed(0)
    text = GROUPED | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    }
    config = hf.Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "hidden_size": 32,
            "patch_size": 2,
            "mlp_ratio": 2,
        },
        image_token_id=31,
        video_token_id=32,
        vision_start_token_id=33,
        vision_end_token_id=34,
    )
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(4)
    model.set_attn_implementation({"text_config": "heedful"})
    ids = torch.tensor([[5, 6, 33, 31, 31, 31, 31, 34, 7, 8, 9, 10, 11]])
    told = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 31).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    return model, told


def llava() -> tuple[hf.PreTrainedModel, dict[str, torch.Tensor]]:
    """A LLaVA with an image of 4 tokens amid the text, and its inputs."""
    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16}
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**GROUPED),
        vision_config=hf.CLIPVisionConfig(**vision, num_attention_heads=2, num_hidden_layers=2),
        image_token_index=31,
    )
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(4)
    model.set_attn_implementation({"text_config": "heedful"})
    ids = torch.tensor([[5, 6, 31, 31, 31, 31, 7, 8, 9, 10, 11]])
    told = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 8, 8)}
    return model, told
