"""SnapKV: its choice against loops, decoding against a dense model that sees only what was kept."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf

from heedful.cache import SnapKVCache, SnapKVStreamingCache
from heedful.cache.snapkv import snapkv_select
from tests.cache_families import made, stepwise, tokens


def transcription(query, key, value, window, capacity, kernel, pooling):
    """One batch row and one head at a time; the places kept, best first."""
    n, d = query.shape
    scores = []
    for j in range(n - window):
        total = 0.0
        for i in range(n - window, n):
            row = [math.exp(float(query[i] @ key[t]) / math.sqrt(d)) for t in range(i + 1)]
            total += row[j] / sum(row)
        scores.append(total)
    pooled = []
    for j in range(n - window):
        near = [
            scores[t] if 0 <= t < n - window else 0.0 for t in range(j - kernel // 2, j + kernel // 2 + 1)
        ]
        pooled.append(sum(near) / kernel if pooling == "avg" else max(near))
    best = sorted(range(n - window), key=lambda j: -pooled[j])[: capacity - window]
    return best + list(range(n - window, n)), pooled


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_choice_equals_transcription(pooling):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 23, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    kept_keys, kept_values = snapkv_select(
        query, key, value, window=4, capacity=11, kernel=5, pooling=pooling
    )
    assert kept_keys.shape == (2, 3, 11, 5)
    for b in range(2):
        for h in range(3):
            wanted, pooled = transcription(query[b, h], key[b, h], value[b, h], 4, 11, 5, pooling)
            got = [int((key[b, h] == row).all(-1).nonzero()) for row in kept_keys[b, h]]
            if pooling == "avg":
                assert got == wanted
            else:  # equal scores in any order
                assert got[7:] == wanted[7:] and len(set(got)) == 11
                near = [pooled[j] for j in got[:7]]
                assert near == pytest.approx([pooled[j] for j in wanted[:7]], rel=1e-5)  # scored in float32
            assert torch.equal(kept_values[b, h], value[b, h, got])


def test_a_short_prompt_is_kept_and_a_prompt_of_the_capacity_is_permuted():
    x = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    key, value = snapkv_select(*x, window=2, capacity=10)
    assert key is x[1] or torch.equal(key, x[1])
    key, value = snapkv_select(*x, window=2, capacity=9)
    assert not torch.equal(key, x[1])
    assert torch.equal(key.sort(2).values, x[1].sort(2).values)
    assert torch.equal(key[:, :, -2:], x[1][:, :, -2:]) and torch.equal(value[:, :, -2:], x[2][:, :, -2:])
    model, ids = made(), tokens(1, 9)
    how = {"max_new_tokens": 8, "do_sample": False}
    cache = SnapKVCache(model, window=2, capacity=9)
    assert torch.equal(model.generate(ids, past_key_values=cache, **how), model.generate(ids, **how))


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_shared_kv_heads_choose_together(reduce):
    """The choice of a KV head is that of the reduced scores of its query heads, here by hand."""
    model, ids = made(num_hidden_layers=1), tokens(1, 20)
    seen = {}

    def hook(module, args, kwargs, output):
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:2], -1, module.head_dim)
        query, key = (proj(hidden).view(shape).transpose(1, 2) for proj in (module.q_proj, module.k_proj))
        seen["qk"] = hf.models.llama.modeling_llama.apply_rotary_pos_emb(
            query, key, *kwargs["position_embeddings"]
        )

    cache = SnapKVCache(model, window=3, capacity=8, kernel=3, group_reduce=reduce)
    with model.model.layers[0].self_attn.register_forward_hook(hook, with_kwargs=True), torch.no_grad():
        model(ids, past_key_values=cache)
    query, key = seen["qk"]
    for h in range(2):
        scores = []
        for g in range(2):
            logits = query[0, 2 * h + g, -3:] @ key[0, h].T / 8**0.5
            logits[:, 17:] += torch.full((3, 3), -torch.inf).triu(1)
            scores.append(logits.softmax(-1)[:, :17].sum(0))
        joint = torch.stack(scores).mean(0) if reduce == "mean" else torch.stack(scores).amax(0)
        pooled = torch.nn.functional.avg_pool1d(joint[None], 3, 1, 1)[0]
        wanted = [*pooled.topk(5).indices.tolist(), 17, 18, 19]
        torch.testing.assert_close(cache.layers[0].keys[0, h], key[0, h, wanted])


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_decoding_sees_what_was_kept_at_its_own_positions(family):
    """A dense step over the prompt, masked to the kept places; one layer, so keys do not depend on it."""
    model, ids = made(family, num_hidden_layers=1), tokens(1, 24)
    cache = SnapKVCache(model, window=3, capacity=8)
    logits = stepwise(model, ids, cache, 16)
    with torch.no_grad():
        full = hf.DynamicCache(config=model.config)
        model(ids, past_key_values=full)
        assert cache.layers[0].keys.shape[2] == 8 + 8  # later tokens are added, none is dropped
        heads = cache.layers[0].keys.shape[1]
        visible = torch.zeros(1, heads, 1, 24, dtype=torch.bool)
        for h in range(heads):
            near = torch.cdist(cache.layers[0].keys[0, h], full.layers[0].keys[0, h])
            visible[0, h, 0, near.argmin(1)] = True
        visible = visible.repeat_interleave(4 // heads, dim=1)
        model.set_attn_implementation("eager")
        bias = torch.zeros(1, 4, 24, 24).masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf)
        bias[:, :, 16:] = bias[:, :, 16:].masked_fill(~visible, -torch.inf)
        wanted = model(ids, attention_mask=bias).logits[:, 16:]
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)  # float32, weights * 4


def test_layers_may_differ():
    model = made(num_hidden_layers=3)
    cache = SnapKVCache(
        model, window=[2, 3, 4], capacity=[5, 9, 40], kernel=[1, 3, 5], pooling=["avg", "max", "avg"]
    )
    model.generate(tokens(1, 20), past_key_values=cache, max_new_tokens=5)
    assert [layer.keys.shape[2] for layer in cache.layers] == [9, 13, 24]
    assert cache.get_seq_length() == 24


def test_composition_turns_the_prompt_forward():
    """One layer: a step sees the prompt's entries just before the last tokens, at distances in the cache."""
    model, ids = made(num_hidden_layers=1), tokens(1, 26)
    cache = SnapKVStreamingCache(model, window=3, capacity=30, recent=4)  # keeps the prompt whole
    logits = stepwise(model, ids, cache, 10)
    for i in range(10, 26):
        text = ids[:, : i + 1] if i < 15 else torch.cat([ids[:, :10], ids[:, i - 4 : i + 1]], dim=1)
        with torch.no_grad():
            wanted = model(text).logits[:, -1]
        torch.testing.assert_close(logits[:, i - 10], wanted, rtol=1e-3, atol=1e-3)
    small = SnapKVStreamingCache(model, window=3, capacity=6, recent=4)
    stepwise(model, ids, small, 10)
    assert small.layers[0].keys.shape[2] == 10 and small.layers[0].dropped.tolist() == [12]
    assert small.get_seq_length() == 26


@pytest.mark.door
def test_errors_say_what_to_do():
    model = made()
    for wrong, match in (
        ({"window": 8, "capacity": 8}, "capacity is 8, must be more than window, which is 8"),
        ({"kernel": 4}, "kernel is 4, must be odd"),
        ({"pooling": "sum"}, "pooling is 'sum', must be one of 'avg', 'max'"),
        ({"group_reduce": "sum"}, "group_reduce is 'sum', must be"),
        ({"window": [2, 3, 4]}, "window has 3 entries, must have one for each of 2 layers"),
    ):
        with pytest.raises(ValueError, match=match):
            SnapKVCache(model, **wrong)
    with pytest.raises(ValueError, match="recent is 0, must be"):
        SnapKVStreamingCache(model, recent=0)
    with pytest.raises(ValueError, match="budget is 1, must be at least 2"):
        SnapKVCache.of_budget(model, 1)
