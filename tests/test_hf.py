"""heedful inside transformers models: equal to their eager attention, with and without patterns."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    T5Config,
    ViTConfig,
)

import heedful.hf
from heedful import patterns as p

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
DECODERS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "gpt-oss": GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
    ),
}


def decoder(name: str):
    torch.manual_seed(0)
    # A config belongs to its model: the attention implementation is written into it.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(DECODERS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that attention is far from uniform
    return model


def batch(padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = 0
    if padding == "right":
        mask[1, 8:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(model, **inputs):
    """The output under eager attention and under heedful."""
    found = []
    for name in ("eager", "heedful"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found.append(model(**inputs))
    return found


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_logits_equal_eager(name, padding):
    inputs = batch(padding)
    eager, ours = both(decoder(name), **inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], eager.logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_the_same_tokens(name):
    model = decoder(name)
    found = []
    for attention in ("eager", "heedful"):
        model.set_attn_implementation(attention)
        found.append(model.generate(**batch("left"), max_new_tokens=8, do_sample=False))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_with_a_static_cache_and_beams(name):
    model = decoder(name)
    for extra in ({"cache_implementation": "static"}, {"num_beams": 3}):
        found = []
        for attention in ("eager", "heedful"):
            model.set_attn_implementation(attention)
            found.append(model.generate(**batch("left"), max_new_tokens=6, do_sample=False, **extra))
        assert torch.equal(*found)


def test_bert_with_padding_equals_eager():
    torch.manual_seed(0)
    model = AutoModel.from_config(BertConfig(**SMALL)).eval()
    inputs = batch("right")
    eager, ours = both(model, **inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        ours.last_hidden_state[real], eager.last_hidden_state[real], atol=1e-5, rtol=1e-5
    )


def test_vit_equals_eager():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=12,
        patch_size=4,
    )
    eager, ours = both(AutoModel.from_config(config).eval(), pixel_values=torch.randn(2, 3, 12, 12))
    torch.testing.assert_close(ours.last_hidden_state, eager.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_masks_made_by_the_caller_and_packed_sequences():
    model = decoder("llama")
    ids = batch("none")["input_ids"]
    seen = torch.tril(torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(2)) < 0.6)
    seen |= torch.eye(11, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(input_ids=ids, attention_mask=added).logits
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
        eager_packed = model(input_ids=ids, position_ids=packed, use_cache=False).logits
        plain = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation("heedful")
    with torch.no_grad():
        for mask in (added, seen):
            ours = model(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)
        ours = model(input_ids=ids, position_ids=packed, use_cache=False).logits
    torch.testing.assert_close(ours, eager_packed, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 1e-2  # the packing was seen


def explicit(pattern: p.Pattern, inputs: dict[str, torch.Tensor], window: int | None = None) -> torch.Tensor:
    """The model's mask and the pattern as the table that eager attention adds."""
    n = inputs["input_ids"].shape[1]
    own = p.Causal() if window is None else p.Window(window - 1, 0)
    seen = (own.mask(n) & pattern.mask(n)) & inputs["attention_mask"][:, None, None].bool()
    return torch.zeros(2, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_pattern_equals_eager_with_the_mask_and_leaves_no_trace(name):
    model, inputs = decoder(name), batch("left")
    window = DECODERS[name].sliding_window if name == "mistral" else None
    pattern = p.Window(2) | p.Sink(5)
    real = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ids = {"input_ids": inputs["input_ids"], "position_ids": positions}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(**ids, attention_mask=explicit(pattern, inputs, window)).logits
    model.set_attn_implementation("heedful")
    with torch.no_grad():
        before = model(**ids, attention_mask=inputs["attention_mask"]).logits
        with heedful.hf.use_pattern(pattern):
            ours = model(**ids, attention_mask=inputs["attention_mask"]).logits
        after = model(**ids, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(ours[real], wanted[real], atol=1e-5, rtol=1e-5)
    assert (ours - before)[real].abs().max() > 1e-3  # the pattern took something away
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("static", [False, True])
def test_decoding_under_a_pattern_equals_the_whole_sequence(name, static):
    """Positions keep counting from the first token, also where the cache has dropped it."""
    model, ids = decoder(name), batch("none")["input_ids"]
    model.set_attn_implementation("heedful")
    pattern = p.Sink(2) | p.Window(1) | p.Window(5, dilation=2)
    cache = StaticCache(model.config, max_cache_len=20) if static else None
    with torch.no_grad(), heedful.hf.use_pattern(pattern):
        whole = model(input_ids=ids, use_cache=False).logits
        pieces = []
        for piece in ids.split([6, 1, 3, 1], dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_patterns_by_layer():
    model, inputs = decoder("llama"), batch("none")
    model.set_attn_implementation("heedful")

    def run(choice) -> torch.Tensor:
        with torch.no_grad(), heedful.hf.use_pattern(choice):
            return model(**inputs).logits

    near, far = p.Window(1), p.Window(3)
    by_index = run({0: near, 1: far})
    by_module = run(lambda module: (near, far)[module.layer_idx])
    assert torch.equal(by_index, by_module)
    with torch.no_grad():
        plain = model(**inputs).logits
    assert torch.equal(run({7: near}), plain)
    assert torch.equal(run({0: None}), plain)
    outcomes = [by_index, run(near), run(far), run({0: near}), run({1: near}), plain]
    for i, one in enumerate(outcomes):
        for other in outcomes[:i]:
            assert (one - other).abs().max() > 1e-4


def test_training_through_heedful_gives_eager_gradients():
    model, inputs = decoder("qwen3"), batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for attention in ("eager", "heedful"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append([g.grad.clone() for g in model.parameters()])
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-3)


def test_regular_masks_travel_as_patterns():
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = copy.deepcopy(DECODERS["mistral"])
    config._attn_implementation = "heedful"
    x = torch.zeros(2, 11, 32)
    for make, pattern in (
        (create_causal_mask, p.Causal()),
        (create_sliding_window_causal_mask, p.Window(3, 0)),
    ):
        made = make(config, x, batch("left")["attention_mask"], None)
        assert made.pattern == pattern
        assert made.table is None
        assert torch.equal(made.key_mask, batch("left")["attention_mask"].bool())


def test_a_pattern_that_reaches_no_attention_warns():
    model, inputs = decoder("llama"), batch("none")
    model.set_attn_implementation("eager")
    with (
        pytest.warns(UserWarning, match="no attention ran through heedful"),
        heedful.hf.use_pattern(p.Full()),
    ):
        model(**inputs)
    model.set_attn_implementation("heedful")
    with warnings.catch_warnings(), heedful.hf.use_pattern(p.Full()):
        warnings.simplefilter("error")
        model(**inputs)


def test_the_context_is_left_after_an_exception():
    model, inputs = decoder("llama"), batch("none")
    model.set_attn_implementation("heedful")

    def broken():
        with heedful.hf.use_pattern(p.Window(1)):
            model(**inputs)
            raise RuntimeError("stop")

    with torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(RuntimeError, match="stop"):
            broken()
        assert torch.equal(model(**inputs).logits, before)


def test_relative_position_bias_and_cross_attention_equal_eager():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = AutoModel.from_config(config).eval()
    eager, ours = both(model, **batch("right"), decoder_input_ids=torch.tensor([[0, 5, 6], [0, 7, 8]]))
    torch.testing.assert_close(ours.last_hidden_state, eager.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_honoured_is_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**GROUPED, head_dim=8)).eval()
    model.set_attn_implementation("heedful")
    with pytest.raises(ValueError, match="Gemma2Attention asks for softcap"):
        model(**batch("none"))
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="asks for output_attentions"):
        heedful.hf.attention_forward(torch.nn.Identity(), query, query, query, None, output_attentions=True)


@pytest.mark.door
def test_errors_at_the_door():
    with pytest.raises(ValueError, match="pattern is 3, must be a heedful pattern"):  # noqa: SIM117
        with heedful.hf.use_pattern(3):
            pass
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), must be"):
        heedful.hf.attention_forward(torch.nn.Identity(), query, query, query, torch.ones(1, 3))
    with (
        pytest.raises(ValueError, match="Identity has no layer_idx"),
        heedful.hf.use_pattern({0: p.Full()}),
    ):
        heedful.hf.attention_forward(torch.nn.Identity(), query, query, query, None)
