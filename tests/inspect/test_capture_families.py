"""Capture beside the eager attention of each model family, in a batch with padding and in beam search."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from heedful.inspect import Site, capture
from tests.steer.models import TEXT, llava, picture_prompt, qwen_prompt, qwen_vl, sharpened, words

SOUND = {
    "vocab_size": 31,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
PICTURE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
ALONE = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}  # a head for each query
BERT = {key: value for key, value in ALONE.items() if "bos" not in key and "eos" not in key}


def text(kind: str, **config) -> tuple[hf.PreTrainedModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, **config)
    return sharpened(hf.AutoModelForCausalLM.from_config(config)), words()


def qwen2():
    told = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    return text("qwen2", **TEXT, **told)


def qwen3():
    told = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    return text("qwen3", **TEXT, head_dim=8, **told)


def mistral():
    return text("mistral", **TEXT, sliding_window=4)


def gemma2():
    cap = {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 1}  # which many logits reach
    return text("gemma2", **TEXT, **cap, head_dim=8, sliding_window=4, layer_types=SLIDING)


def gemma3():
    told = {"head_dim": 8, "sliding_window": 4, "layer_types": SLIDING, "query_pre_attn_scalar": 1}
    return text("gemma3_text", **TEXT, **told)


def bert():
    torch.manual_seed(0)
    return sharpened(hf.BertModel(hf.BertConfig(**BERT))), words()


def vit():
    torch.manual_seed(0)
    model = sharpened(sharpened(hf.ViTModel(hf.ViTConfig(**PICTURE))))
    return model, {"pixel_values": torch.randn(2, 3, 8, 8)}


def clip():
    torch.manual_seed(0)
    config = hf.CLIPConfig(text_config=BERT | {"eos_token_id": 30}, vision_config=PICTURE, projection_dim=8)
    told = words()
    told["input_ids"][:, -1] = 30  # CLIP looks for the end
    return sharpened(hf.CLIPModel(config)), {**told, "pixel_values": torch.randn(2, 3, 8, 8)}


def whisper():
    torch.manual_seed(0)
    model = sharpened(hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SOUND)))
    ids = torch.randint(3, 31, (2, 5))
    return model, {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": ids}


WRITERS = {
    "llama": lambda: text("llama", **TEXT),
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma": lambda: text("gemma", **TEXT, head_dim=8),
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt-neox": lambda: text("gpt_neox", **ALONE),
    "whisper": whisper,
    "llava": lambda: (llava(), picture_prompt()),
    "qwen2-vl": lambda: (qwen_vl("qwen2_vl"), qwen_prompt()),
    "qwen2.5-vl": lambda: (qwen_vl("qwen2_5_vl"), qwen_prompt()),
    "qwen3-vl": lambda: (qwen_vl("qwen3_vl"), qwen_prompt()),
}
FAMILIES = {**WRITERS, "bert": bert, "vit": vit, "clip": clip}

_own: list[tuple[torch.nn.Module, torch.Tensor]] = []


def _eager(module, query, key, value, attention_mask, **how):
    """The eager function beside the module's class, with a note of its weights."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    output, weights = own(module, query, key, value, attention_mask, **how)
    _own.append((module, weights))
    return output, weights


AttentionInterface.register("noted-eager", _eager)
AttentionMaskInterface.register("noted-eager", eager_mask)


def both(model, run) -> tuple[list[tuple[str, int, bool, torch.Tensor]], list[tuple[str, torch.Tensor]]]:
    """What capture sees of a run, and what eager attention notes of another one."""
    seen = []

    def see(site: Site) -> None:
        seen.append((site.name, site.layer, site.cross, site.weights()))

    with torch.no_grad():
        with capture(model, see):
            inside = run(model)
        model.set_attn_implementation("noted-eager")
        _own.clear()
        wanted = run(model)
    torch.testing.assert_close(inside, wanted, rtol=1e-4, atol=1e-4)  # float32, weights times 4
    names = {module: name for name, module in model.named_modules()}
    return seen, [(names[module], weights) for module, weights in _own]


def same(seen, own, real: torch.Tensor | None) -> None:
    """Call by call the same module and weights; `real` marks the tokens of a padded prompt."""
    assert [name for name, *_ in seen] == [name for name, _ in own]
    for (name, _, _, found), (_, wanted) in zip(seen, own, strict=True):
        assert found.shape == wanted.shape
        sees = found.sum(-1) > 0  # padding before all else sees nothing: zeros, for which eager has any row
        text = real is not None and found.shape[2] == real.shape[1] and "vis" not in name
        assert sees[real[:, None].expand_as(sees)].all() if text else sees.all()
        torch.testing.assert_close(found[sees], wanted[sees], rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_eager_attention(family):
    model, inputs = FAMILIES[family]()
    mask = inputs.get("attention_mask")
    real = None if mask is None else mask.bool()

    def run(m):
        out = m(**inputs)
        if family == "clip":
            return out.logits_per_image
        return out[0] if real is None else out[0][real]

    seen, own = both(model, run)
    same(seen, own, real)
    assert sum(bool(weights.max() > 2 / weights.shape[-1]) for *_, weights in seen) > 1  # not all alike
    assert {cross for _, _, cross, _ in seen} == ({True, False} if family == "whisper" else {False})


@pytest.mark.parametrize("family", WRITERS)
def test_every_step_of_beam_search_is_seen(family):
    model, inputs = WRITERS[family]()
    if family == "whisper":
        inputs = {"input_features": inputs["input_features"]}
    how = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "suppress_tokens": [27, 28, 29, 30]}
    seen, own = both(model, lambda m: m.generate(**inputs, **how))
    assert [name for name, *_ in seen] == [name for name, _ in own]
    mask = inputs.get("attention_mask")
    same(seen, own, None if mask is None else mask.bool().repeat_interleave(3, dim=0))
    layers = {(name, layer) for name, layer, cross, _ in seen if "vis" not in name and "encoder." not in name}
    assert len(seen) > 4 * len(layers)  # the prompt and the tokens after it
