"""What every cache policy promises: the full cache while everything fits, rows apart, memory freed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from heedful.cache import (
    DHSAPrefillCache,
    LayerReuseCache,
    RecycledCache,
    SnapKVCache,
    SnapKVStreamingCache,
    StreamingCache,
    create,
    names,
)
from heedful.cache.layer import PolicyLayer
from heedful.kept import forget
from tests.cache_families import FAMILIES, llava, made, qwen2_vl, stepwise, tokens

DHSA = {"block_size": 2, "chunk_size": 2, "local_tokens": 2, "global_tokens": 1, "instruction_tokens": 2}
# Each policy with a small budget, and with one that covers 40 tokens.
POLICIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "streaming": (
        lambda m: StreamingCache(m, sinks=2, window=6),
        lambda m: StreamingCache(m, sinks=2, window=38),
    ),
    "snapkv": (
        lambda m: SnapKVCache(m, window=3, capacity=7, kernel=3),
        lambda m: SnapKVCache(m, window=3, capacity=40),
    ),
    "snapkv-max": (
        lambda m: SnapKVCache(m, window=[2, 3], capacity=[6, 8], kernel=3, pooling="max", group_reduce="max"),
        lambda m: SnapKVCache(m, window=3, capacity=[30, 40], pooling="max"),
    ),
    "snapkv-streaming": (
        lambda m: SnapKVStreamingCache(m, window=3, capacity=7, recent=3),
        lambda m: SnapKVStreamingCache(m, window=3, capacity=20, recent=20),
    ),
    "recycled": (
        lambda m: RecycledCache(m, tokens=4, stride=3),
        lambda m: RecycledCache(m, tokens=40, stride=3),
    ),
    "recycled-dynamic": (
        lambda m: RecycledCache(m, tokens=4, check=2, similarity=0.8),
        lambda m: RecycledCache(m, tokens=40, check=2, similarity=0.8),
    ),
    "hylra": (
        lambda m: LayerReuseCache(m, sources=[None, 0], tokens=4, sinks=1, recent=2),
        lambda m: LayerReuseCache(m, sources=[None, 0], tokens=40, sinks=1, recent=2),
    ),
    "dhsa": (
        lambda m: DHSAPrefillCache(m, budget=6, **DHSA),
        lambda m: DHSAPrefillCache(m, budget=40, **DHSA),
    ),
}
KEEPS_ALL = ("recycled", "recycled-dynamic", "hylra", "dhsa")  # what they save is time
HOW = {"max_new_tokens": 9, "do_sample": False}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_unchanged_while_everything_fits(family, policy):
    model = made(family)
    ids = tokens(2, 6)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **HOW)
    cache = POLICIES[policy][1](model)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **HOW)
    assert torch.equal(got, wanted)
    assert cache.get_seq_length() == 14
    cache.reset()
    got = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **HOW)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_padded_rows_are_the_rows_alone(policy, beams):
    model, ids = made(), tokens(3, 13)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    how = HOW | {"num_beams": beams}
    make = POLICIES[policy][0]
    together = model.generate(ids * mask, attention_mask=mask, past_key_values=make(model), **how)[:, 13:]
    for row in range(3):
        alone = ids[row : row + 1, mask[row] == 1]
        got = model.generate(alone, past_key_values=make(model), **how)[0, alone.shape[1] :]
        assert torch.equal(got, together[row])


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_those_of_the_tensors_held(policy):
    model, ids = made(), tokens(1, 30)
    cache, full = POLICIES[policy][0](model), hf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=full)
    held = 0
    for layer in cache.layers:
        for name in layer.rows:
            if isinstance(x := getattr(layer, name), torch.Tensor):
                assert (
                    x.untyped_storage().nbytes() == x.numel() * x.element_size()
                )  # no view of what was dropped
                held += x.numel() * x.element_size()
        assert layer.keys.shape[1] == 2  # KV heads unrepeated
    assert cache.nbytes() == held
    whole = sum(2 * layer.keys.numel() * 4 for layer in full.layers)
    assert (held >= whole) == (policy in KEEPS_ALL)


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_is_freed(policy):
    """All tensors alive after a prompt of 200, the model's aside, are those whose bytes the cache tells."""
    model, ids = made(max_position_embeddings=256), tokens(1, 200)
    make = POLICIES[policy][0]
    with torch.no_grad():
        model(ids, past_key_values=make(model))  # whatever is made once for all calls
        gc.collect()
        gc.freeze()  # what there is by now is not looked at
        try:
            cache = make(model)
            model(ids, past_key_values=cache, logits_to_keep=1)
            held = bytes_alive()
        finally:
            gc.unfreeze()
    assert held == pytest.approx(cache.nbytes(), abs=256)
    full = 2 * 2 * 200 * 2 * 8 * 4
    assert (held < full / 8) == (policy not in KEEPS_ALL)


def bytes_alive() -> int:
    """Bytes of the storages of all tensors, but for those that heedful keeps for later calls."""
    forget()
    gc.collect()
    found = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({x.data_ptr(): x.nbytes() for x in found}.values())


SLIDING = {
    "qwen2": {"use_sliding_window": True},
    "gemma3": {},
    "gpt-oss": {},  # also with sink logits
}


@pytest.mark.parametrize("family", SLIDING)
@pytest.mark.parametrize("policy", POLICIES)
def test_sliding_layers_stay_as_they_are(policy, family):
    kinds = ["full_attention", "sliding_attention"]
    model = made(family, sliding_window=3, layer_types=kinds, **SLIDING[family])
    cache = POLICIES[policy][0](model)
    assert isinstance(cache.layers[0], PolicyLayer)
    assert type(cache.layers[1]).__name__ == "DynamicSlidingWindowLayer"
    model.generate(tokens(1, 9), past_key_values=cache, **HOW)
    assert cache.layers[1].keys.shape[2] == 2
    cache, ids = POLICIES[policy][1](model), tokens(1, 9)
    wanted = model.generate(ids, **HOW)
    assert torch.equal(model.generate(ids, past_key_values=cache, **HOW), wanted)


def test_a_model_of_sliding_layers_alone_keeps_them():
    model, ids = made("mistral", sliding_window=3), tokens(1, 12)
    wanted = model.generate(ids, **HOW)
    for name in names():
        cache = create(name, model, budget=8)
        assert torch.equal(model.generate(ids, past_key_values=cache, **HOW), wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_beams_are_unchanged_while_everything_fits(policy):
    model, ids = made(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    how = HOW | {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    wanted = model.generate(ids * mask, **how)
    cache = POLICIES[policy][1](model)
    assert torch.equal(model.generate(ids * mask, past_key_values=cache, **how), wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_in_pieces(policy):
    """Pieces of 4; the second row has none of its tokens in the first two."""
    model, ids = made(), tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    how = HOW | {"attention_mask": mask}
    wanted = model.generate(ids * mask, **how)
    small, big = (make(model) for make in POLICIES[policy])
    got = model.generate(ids * mask, past_key_values=big, prefill_chunk_size=4, **how)
    assert torch.equal(got, wanted)
    got = model.generate(ids * mask, past_key_values=small, prefill_chunk_size=4, **how)
    assert got.shape == wanted.shape and small.get_seq_length() == 25


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "dhsa"])
def test_prompts_are_attended_in_full(policy):
    """All policies but a sparse prompt's drop entries, or read fewer, only after the prompt."""
    model, ids = made(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        wanted = model(ids * mask, attention_mask=mask).logits
        got = model(ids * mask, attention_mask=mask, past_key_values=POLICIES[policy][0](model)).logits
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1, 7:], wanted[1, 7:])


def test_single_tokens_behind_a_sparse_prompt_see_everything():
    """In one layer a token's logits hang on the keys alone, which a sparse prompt leaves as they are."""
    model, ids = made(num_hidden_layers=1), tokens(1, 30)
    full = hf.DynamicCache(config=model.config)
    wanted = stepwise(model, ids, full, 20)
    torch.testing.assert_close(stepwise(model, ids, POLICIES["dhsa"][0](model), 20), wanted)


# Positions on three axes cannot be moved by a shift on one.
IMAGES = [(m, p) for m in (llava, qwen2_vl) for p in POLICIES if m is llava or "streaming" not in p]


@pytest.mark.parametrize(("model_of", "policy"), IMAGES)
def test_text_with_an_image(model_of, policy):
    model, told = model_of()
    wanted = model.generate(**told, **HOW)
    big = model.generate(**told, past_key_values=POLICIES[policy][1](model), **HOW)
    assert torch.equal(big, wanted)
    small = POLICIES[policy][0](model)
    assert model.generate(**told, past_key_values=small, **HOW).shape == wanted.shape


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "streaming"])
@pytest.mark.door
def test_another_attention_implementation_is_told_what_to_do(policy):
    model = made(implementation="sdpa")
    with pytest.raises(ValueError, match=r'looks at the queries.*set_attn_implementation\("heedful"\)'):
        model.generate(tokens(1, 5), past_key_values=POLICIES[policy][0](model), **HOW)


def test_every_policy_is_created_by_a_budget():
    model = made()
    for name in names():
        cache = create(name, model, budget=24)
        model.generate(tokens(1, 30), past_key_values=cache, **HOW)
        assert cache.get_seq_length() == 38


@pytest.mark.door
@pytest.mark.parametrize("policy", ["streaming", "snapkv-streaming"])
def test_positions_on_three_axes_are_refused(policy):
    model, _ = qwen2_vl()
    with pytest.raises(ValueError, match="cached keys cannot be moved"):
        POLICIES[policy][0](model)
