"""Tiny models to steer: a Llama, a LLaVA with a CLIP tower, and Qwen-VL models with images of any shape."""

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


def qwen_vl(kind: str) -> hf.PreTrainedModel:
    """A "qwen2_vl", "qwen2_5_vl" or "qwen3_vl": 2 x 2 patches a token, no class token."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 3, "num_heads": 2, "patch_size": 2}
    more = {
        "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        "qwen2_5_vl": {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 8},
        "qwen3_vl": {
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
    }[kind]
    if kind == "qwen2_5_vl":
        more["fullatt_block_indexes"] = [1]
    config = hf.AutoConfig.for_model(
        kind,
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope},
        vision_config={**vision, **more},
        image_token_id=IMAGE,
        video_token_id=30,
        vision_start_token_id=27,
        vision_end_token_id=28,
    )
    return sharpened(hf.AutoModelForImageTextToText.from_config(config))


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


def qwen_prompt(grids: tuple[tuple[int, int], ...] = ((4, 6), (4, 4))) -> dict[str, torch.Tensor]:
    """Two words, an image of the given rows and columns of patches, four words; padding on the left."""
    generator = torch.Generator().manual_seed(1)
    counts = [height * width // 4 for height, width in grids]
    length = max(counts) + 8
    ids = torch.randint(1, 26, (len(grids), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(counts):
        begin = length - 5 - count
        ids[row, begin : begin + count] = IMAGE
        ids[row, begin - 1], ids[row, begin + count] = 27, 28
        mask[row, : begin - 3] = 0
    patches = sum(height * width for height, width in grids)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(patches, 3 * 2 * 2 * 2, generator=generator),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
    }


def words(batch: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 31, (batch, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
