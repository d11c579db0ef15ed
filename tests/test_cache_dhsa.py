"""Sparse prompts by DHSA: against loops over blocks and chunks, in pieces, padded, and on a long prompt."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf

from heedful.cache import DHSAPrefillCache
from heedful.cache.dhsa_prefill import DHSAPrefillLayer, _Routed, _Rule
from heedful.hf import Handler, attention_forward, tap, use_pattern
from heedful.hf.attention import Visible
from heedful.ops.attention import attention
from heedful.patterns import Causal, Window
from heedful.routing.boundary_predictor import BoundaryPredictor
from tests.cache_families import made, tokens

RULE = _Rule(
    budget=9,
    block_size=4,
    chunk_size=3,
    local_tokens=4,
    global_tokens=2,
    instruction_tokens=5,
    threshold=0.0,
    nms_window=1,
    chunk_beta=2,
)


def seen_by_hand(query, key, ends, past):
    """Of one batch row, lists in place of tensors: the keys that each query sees."""
    n, m = query.shape[1], key.shape[1]
    q, k = query.mean(0), key.mean(0)
    chunks = list(zip([0, *ends], [*ends, m], strict=True))
    sparse = n - RULE.instruction_tokens
    seen = []
    for i in range(sparse):
        first = i // 4 * 4
        block = sum(q[t] for t in range(first, min(first + 4, sparse))) / 4
        high = min(past + first + 4, m)
        picked = set(range(high - 4, high)) | set(range(min(2, high - 4)))
        score = {
            c: float(block @ sum(k[t] for t in range(a, z)) / (z - a) * math.sqrt(z - a))
            for c, (a, z) in enumerate(chunks)
            if z > a
        }
        for c in sorted(score, key=lambda c: -score[c]):
            for t in range(*chunks[c]):
                if t < high and t not in picked and len(picked) < 9:
                    picked.add(t)
        seen.append({t for t in picked if t <= past + i})
    return seen + [set(range(past + i + 1)) for i in range(sparse, n)]


def dense(query, key, value, seen):
    mask = torch.zeros(len(seen), key.shape[1], dtype=torch.bool)
    for i, row in enumerate(seen):
        mask[i, sorted(row)] = True
    k, v = (x.repeat_interleave(2, dim=0) for x in (key, value))
    logits = query @ k.mT / math.sqrt(query.shape[-1])
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def draws(n, seed, rows=2):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, 4, n, 6, generator=generator, dtype=torch.float64)
    return query, *torch.randn(2, rows, 2, n, 6, generator=generator, dtype=torch.float64)


def test_prompts_equal_a_transcription():
    """A prompt in two pieces, and a token behind it, which sees everything."""
    layer, module = DHSAPrefillLayer(RULE, None), torch.nn.Identity()
    held, past = None, 0
    for n in (23, 14, 1):
        query, key, value = draws(n, seed=n)
        told = Visible((2, 1, n, past + n), past, 0, Causal())
        got, _ = attention_forward(module, query, *layer.update(key, value), told)
        held = (
            (key, value) if held is None else [torch.cat(x, 2) for x in zip(held, (key, value), strict=True)]
        )
        m = past + n
        for b in range(2):
            keys, values = held[0][b], held[1][b]
            if n == 1:
                seen = [set(range(m))]
            else:
                seen = seen_by_hand(query[b], keys, range(3, m, 3), past)
                assert max(map(len, seen[:-5])) <= 9 < m
            torch.testing.assert_close(got[b].transpose(0, 1), dense(query[b], keys, values, seen))
        past = m


@pytest.mark.parametrize("seed", range(4))
def test_predicted_chunks(seed):
    """With a predictor, chunks end where its logits are largest: the choice once more by hand."""
    torch.manual_seed(seed)
    predictor = BoundaryPredictor(12, heads=2, window=2, hidden=8).double()
    layer, n, end = DHSAPrefillLayer(RULE, predictor), 31, 26
    query, key, value = draws(n, seed=seed, rows=1)
    with torch.no_grad():
        predictor.mlp[2].bias -= predictor(key.transpose(1, 2).flatten(2)).median()
        logits = predictor(key.transpose(1, 2).flatten(2))[0].tolist()
    taken = [end]
    for t in sorted(range(1, n - 2), key=lambda t: -logits[t]):
        if logits[t] > 0 and t <= end and len(taken) < 14 and all(abs(t - other) > 1 for other in taken):
            taken.append(t)
    assert len(taken) > 5
    told = Visible((1, 1, n, n), 0, 0, Causal())
    got, _ = attention_forward(torch.nn.Identity(), query, *layer.update(key, value), told)
    seen = seen_by_hand(query[0], key[0], [t + 1 for t in sorted(taken)], 0)
    torch.testing.assert_close(got[0].transpose(0, 1), dense(query[0], key[0], value[0], seen))


def layer_of(n, padding=0, **changes):
    """A layer that holds a prompt of two rows, the second with `padding`; its queries and what they see."""
    layer = DHSAPrefillLayer(_Rule(**RULE.__dict__ | changes), None)
    query, key, value = (x.float() for x in draws(n, seed=0))
    layer.update(key, value)
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, :padding] = False
    layer.valid = mask if padding else None
    told = {"pattern": Causal(), "bias": None, "key_mask": layer.valid, "query_offset": 0}
    return layer, query, layer.see(query, told)


@pytest.mark.parametrize("padding", [0, 11])
def test_groups_and_mask_are_one_selection(padding):
    """What kernels walk over is what `visible` says, and what sees all is in several groups."""
    _, _, told = layer_of(40, padding)
    pattern = told["pattern"]
    assert isinstance(pattern, _Routed)
    mask = pattern.mask(40, 40)
    groups = pattern.groups(40, 40, 0, torch.device("cpu"))
    assert torch.equal(groups.dense(), mask)
    assert groups.key_index.shape[-1] == 9
    assert mask[0, 0, -1].all() and mask[1, 0, -1].sum() == 40 - padding
    assert not mask[1, 0, :padding].any() and not mask[1, 0, :, :padding].any()


@pytest.mark.parametrize("padding", [0, 11])
def test_backends_agree_on_it(padding):
    layer, query, told = layer_of(40, padding)
    outs = [
        attention(query, layer.keys, layer.values, **told, backend=backend)
        for backend in ("reference", "sdpa", "tiled")
    ]
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(outs[2], outs[0])


def test_a_pattern_of_the_user_still_counts():
    model, ids = made(num_hidden_layers=1), tokens(1, 40)
    options = {"budget": 12, "block_size": 4, "chunk_size": 2, "local_tokens": 4, "global_tokens": 0}
    full = hf.DynamicCache(config=model.config)
    with torch.no_grad(), use_pattern(Window(3, 0)):  # the local tokens hold the window of most queries
        cache = DHSAPrefillCache(model, **options | {"instruction_tokens": 2, "local_tokens": 8})
        got = model(ids, past_key_values=cache).logits
        wanted = model(ids, past_key_values=full).logits
    torch.testing.assert_close(got, wanted)
    cache = DHSAPrefillCache(model, **options, instruction_tokens=2)
    with torch.no_grad():
        assert not torch.allclose(model(ids, past_key_values=cache).logits, wanted)


def test_a_model_under_tap_sees_the_same():
    """Where someone looks at the weights, they are computed densely from what the blocks chose."""

    class Look(Handler):
        def weights(self, site, weights):
            assert int((weights[:, :, :38] > 0).sum(-1).max()) <= 6  # the budget
            return weights

    model, ids = made(), tokens(1, 40)
    sizes = {"block_size": 2, "chunk_size": 2, "local_tokens": 2, "global_tokens": 1, "instruction_tokens": 2}
    plain, looked = (DHSAPrefillCache(model, budget=6, **sizes) for _ in range(2))
    with torch.no_grad():
        wanted = model(ids, past_key_values=plain).logits
        with tap(model, Look()):
            got = model(ids, past_key_values=looked).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)  # float32, weights * 4


def test_a_predictor_in_float32_serves_a_model_in_bfloat16():
    model, ids = made().to(torch.bfloat16), tokens(1, 40)
    sizes = {"block_size": 2, "chunk_size": 2, "local_tokens": 2, "global_tokens": 1, "instruction_tokens": 2}
    torch.manual_seed(0)
    predictor = BoundaryPredictor(16, heads=2, window=2)
    cache = DHSAPrefillCache(model, budget=6, predictor=[None, predictor], threshold=0.0, **sizes)
    with torch.no_grad():
        assert model(ids, past_key_values=cache).logits.isfinite().all()


def test_pairs_looked_at_grow_with_the_budget():
    """A prompt of 4096: the groups hold blocks times budget, and the instruction's rows."""
    n = 4096
    _, _, told = layer_of(
        n, budget=256, block_size=64, chunk_size=16, local_tokens=64, global_tokens=32, instruction_tokens=64
    )
    groups = told["pattern"].groups(n, n, 0, torch.device("cpu"))
    assert groups.visited() <= (256 * (n - 64) + 64 * n) / n**2
    assert groups.key_index.shape[-1] == 256
    assert told["pattern"].table.numel() <= 2 * (n // 64 + 2) * (n + 1)


def test_pieces_of_a_prompt_in_generate():
    """generate(prefill_chunk_size=...) runs, and equals a full cache if all fits."""
    model, ids = made(), tokens(1, 40)
    how = {"max_new_tokens": 6, "do_sample": False}
    sizes = {"block_size": 2, "chunk_size": 2, "local_tokens": 4, "global_tokens": 2, "instruction_tokens": 3}
    wanted = model.generate(ids, **how)
    for budget in (40, 12):
        cache = DHSAPrefillCache(model, budget=budget, **sizes)
        got = model.generate(ids, past_key_values=cache, prefill_chunk_size=16, **how)
        assert cache.get_seq_length() == 45 and got.shape == wanted.shape
        if budget == 40:
            assert torch.equal(got, wanted)


@pytest.mark.door
def test_errors_say_what_to_do():
    model = made()
    for options, match in (
        ({"budget": 0}, "budget is 0, must be"),
        ({"local_tokens": 32}, "local_tokens is 32, must be at least block_size, which is 64"),
        (
            {"budget": 200},
            r"local_tokens \+ global_tokens is 128 \+ 128, must be at most budget, which is 200",
        ),
        ({"predictor": [None]}, "predictor has 1 entries, must have one for each of 2 layers"),
    ):
        with pytest.raises(ValueError, match=match):
            DHSAPrefillCache(model, **options)
    with pytest.raises(ValueError, match="budget is 4, must be at least 8"):
        DHSAPrefillCache.of_budget(model, 4)
