"""Tiny models to steer: a Llama, and a LLaVA with a CLIP tower."""

from __future__ import annotations

import torch
import transformers as hf

IMAGE = 29  # the id of an image token
TEXT = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
}


def llama() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    return sharpened(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)))


def llava() -> hf.LlavaForConditionalGeneration:
    """9 image tokens an image."""
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
    )
    return sharpened(hf.LlavaForConditionalGeneration(config))


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights, so that attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def picture_prompt(batch: int = 2) -> dict[str, torch.Tensor]:
    """Three words, an image, four words; the second row has two words fewer, with padding on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 28, (batch, 16), generator=generator)
    ids[:, 3:12] = IMAGE
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    pixels = torch.randn(batch, 3, 12, 12, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "pixel_values": pixels}


def words(batch: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 31, (batch, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
