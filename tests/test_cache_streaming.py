"""A streaming cache inside transformers models: sinks, window, positions, padding, beams."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import heedful.hf  # noqa: F401  registers the attention implementation
from heedful.cache import StreamingCache, create
from heedful.cache.rerotate import rotation_of

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": hf.LlamaConfig(**GROUPED),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=16),
    "gpt-neox": hf.GPTNeoXConfig(**SIZES),  # turns a quarter of each head
    "cohere": hf.CohereConfig(**GROUPED),  # interleaved pairs
}


def made(family: str, **changes: int) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    told = CONFIGS[family].to_dict() | {"layer_types": None} | changes
    config = type(CONFIGS[family])(**told)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that attention is far from uniform
    return model


def stepwise(model: hf.PreTrainedModel, ids: torch.Tensor, cache: hf.Cache, first: int) -> torch.Tensor:
    """Logits of the tokens from `first` on: a prefill, then single tokens."""
    with torch.no_grad():
        model(ids[:, :first], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, ids.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "heedful"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_step_is_a_pass_over_what_is_kept(family, implementation):
    """One layer knows nothing of the past but its keys: each step is the short text of sinks and window."""
    model = made(family)
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, 37, (1, 19), generator=torch.Generator().manual_seed(0))
    cache = StreamingCache(model, sinks=2, window=5)
    logits = stepwise(model, ids, cache, 6)
    for i in range(6, 19):
        kept = ids[:, : i + 1] if i <= 7 else torch.cat([ids[:, :2], ids[:, i - 5 : i + 1]], dim=1)
        with torch.no_grad():
            wanted = model(kept).logits[:, -1]
        torch.testing.assert_close(logits[:, i - 6], wanted, rtol=1e-3, atol=1e-3)  # float32, after * 4
    assert cache.get_seq_length() == 19
    kept = 7 * 2 * model.config.num_key_value_heads if family != "gpt-neox" else 7 * 2 * 4
    head = getattr(model.config, "head_dim", None) or 8
    assert cache.nbytes() == kept * head * 4 + 8  # and the count of what was dropped
    first = made(family)
    first.set_attn_implementation(implementation)
    full = hf.DynamicCache(config=first.config)
    with torch.no_grad():
        first(ids[:, :2], past_key_values=full)
    # the same two tokens in a shorter call, to the rounding of float32
    torch.testing.assert_close(cache.layers[0].keys[:, :, :2], full.layers[0].keys)


def test_a_block_of_new_tokens_sees_itself_and_the_cache():
    model = made("llama")
    ids = torch.randint(1, 37, (1, 16), generator=torch.Generator().manual_seed(0))
    cache = StreamingCache(model, sinks=2, window=5)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        logits = model(ids[:, 12:], past_key_values=cache).logits
        wanted = model(torch.cat([ids[:, :2], ids[:, 7:]], dim=1)).logits[:, -4:]
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


def test_room_is_made_before_a_prompt():
    model = made("llama")
    ids = torch.randint(1, 37, (1, 16), generator=torch.Generator().manual_seed(0))
    cache = StreamingCache(model, sinks=2, window=7)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        cache.make_room(4)
        assert cache.layers[0].keys.shape[2] == 5
        logits = model(ids[:, 12:], past_key_values=cache).logits
        wanted = model(torch.cat([ids[:, :2], ids[:, 9:]], dim=1)).logits[:, -4:]
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    cache.make_room(100)
    assert cache.layers[0].keys.shape[2] == 2  # the sinks


@pytest.mark.parametrize("family", CONFIGS)
def test_generation_is_unchanged_while_everything_fits(family):
    model = made(family, num_hidden_layers=2)
    ids = torch.randint(1, 37, (1, 6), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, **how)
    assert torch.equal(
        model.generate(ids, past_key_values=StreamingCache(model, sinks=4, window=20), **how), wanted
    )
    assert torch.equal(
        model.generate(ids, past_key_values=StreamingCache(model.config, window=20), **how), wanted
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_padded_rows_are_the_rows_alone(beams):
    model = made("llama", num_hidden_layers=2)
    model.set_attn_implementation("heedful")
    ids = torch.randint(1, 37, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :8] = 0, 0
    how = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams}
    cache = StreamingCache(model, sinks=2, window=6)
    together = model.generate(ids * mask, attention_mask=mask, past_key_values=cache, **how)[:, 11:]
    for row in range(3):
        alone = ids[row : row + 1, mask[row] == 1]
        cache = StreamingCache(model, sinks=2, window=6)
        assert torch.equal(
            model.generate(alone, past_key_values=cache, **how)[0, alone.shape[1] :], together[row]
        )


def test_sliding_layers_stay_as_they_are():
    config = hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    config.num_hidden_layers = 2
    config.layer_types = ["full_attention", "sliding_attention"]
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    cache = StreamingCache(model, window=6)
    assert [type(layer).__name__ for layer in cache.layers] == ["StreamingLayer", "DynamicSlidingWindowLayer"]
    model.generate(torch.ones(1, 5, dtype=torch.long), past_key_values=cache, max_new_tokens=12)
    assert cache.layers[0].keys.shape[2] in (10, 11) and cache.layers[1].keys.shape[2] == 2


def test_rotation_is_the_models():
    for family, config in CONFIGS.items():
        found = rotation_of(config)
        turned = 16 if family == "qwen3" else 2 if family == "gpt-neox" else 8
        wanted = config.rope_parameters["rope_theta"] ** -(torch.arange(0, turned, 2) / turned)
        torch.testing.assert_close(found.frequency, wanted)
        assert found.pairing == ("interleaved" if family == "cohere" else "half")


def test_rotation_is_that_of_the_full_layers():
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**GROUPED | {"num_hidden_layers": 2, "head_dim": 8, "layer_types": kinds})
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    torch.testing.assert_close(rotation_of(config).frequency, 1e6 ** -(torch.arange(0, 8, 2) / 8))


def test_created_by_the_name_of_the_paper():
    cache = create("streaming-llm", made("llama"), budget=20)
    assert (cache.layers[0].sinks, cache.layers[0].window) == (4, 16)


@pytest.mark.door
def test_errors_say_what_to_do():
    model = made("llama")
    ids = torch.ones(2, 9, dtype=torch.long)
    cache = StreamingCache(model, sinks=2, window=4)
    with pytest.raises(
        ValueError, match=r'must know the padding of a batch.*set_attn_implementation\("heedful"\)'
    ):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="without rotary positions"):
        StreamingCache(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with pytest.raises(ValueError, match="window is 0, must be"):
        StreamingCache(model, window=0)
    with pytest.raises(ValueError, match="sinks is -1, must be"):
        StreamingCache(model, sinks=-1)
    with pytest.raises(ValueError, match="model is a int, must be"):
        StreamingCache(3, sinks=0)
    with pytest.raises(ValueError, match="no cache policy is called 'streaming'; did you mean"):
        create("streaming", model, budget=9)
    with pytest.raises(ValueError, match="budget is 4, must be at least 5"):
        create("streaming-llm", model, budget=4)
