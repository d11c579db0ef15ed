"""Core context aware attention against the card's steps by loops, its pattern, cost and state."""

from __future__ import annotations

import math

import pytest
import torch

import heedful
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.core_context_aware import CoreContextAwareAttention
from heedful.routing.core_context import CoreContext, core_tokens

F64 = torch.float64


def turned(x, position):
    """Rotary embedding of x (..., d) at one position: channel j with j + d / 2."""
    d = x.shape[-1]
    angle = position * 10000.0 ** (-torch.arange(0, d, 2, dtype=F64) / d)
    u, v = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()], -1)


def transcription(mixer, x):
    """Steps 1 to 5 of one sequence (n, c), with 1-based t, query by query and head by head."""
    n = len(x)
    g, s, d = mixer.group_size, mixer.window, mixer.head_dim
    share = mixer.heads // mixer.kv_heads
    q, k, v = (layer.weight @ x.T for layer in (mixer.query, mixer.key, mixer.value))
    q, k, v = (y.T.view(n, -1, d) for y in (q, k, v))
    rows = []
    for t in range(1, n + 1):
        heads = []
        for h in range(mixer.heads):
            kv = h // share
            cores = max(0, (t - s) // g)
            keys, values = [], []
            for i in range(1, cores + 1):
                last = i * g  # 1-based
                group = range(last - g, last)
                weight = 0
                for other in range(kv * share, (kv + 1) * share):
                    ql = turned(q[last - 1, other], last - 1)
                    logits = torch.stack([ql @ turned(k[j, kv], j) for j in group]) / math.sqrt(d)
                    weight = weight + logits.softmax(0) / share
                keys.append(turned(sum(w * k[j, kv] for w, j in zip(weight, group, strict=True)), last - 1))
                values.append(sum(w * v[j, kv] for w, j in zip(weight, group, strict=True)))
            a = max(1, t - s - (t - s) % g) if t > s else 1
            if cores and not mixer.overlap:
                a = cores * g + 1
            for j in range(a - 1, t):
                keys.append(turned(k[j, kv], j))
                values.append(v[j, kv])
            assert len(keys) == cores + t - a + 1
            logits = torch.stack(keys) @ turned(q[t - 1, h], t - 1) / math.sqrt(d)
            heads.append(logits.softmax(0) @ torch.stack(values))
        rows.append(mixer.out.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("overlap", [True, False])
def test_equals_transcription(overlap):
    torch.manual_seed(0)
    mixer = CoreContextAwareAttention(
        12, heads=2, kv_heads=1, group_size=3, window=4, overlap=overlap, dtype=F64
    )
    x = torch.randn(2, 17, 12, dtype=F64, requires_grad=True)
    y, expected = mixer(x), torch.stack([transcription(mixer, row) for row in x])
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )


def test_up_to_the_window_it_is_dense_causal_attention():
    mixer = CoreContextAwareAttention(16, heads=4, kv_heads=2, window=20, dtype=F64)
    dense = SelfAttention(16, heads=4, kv_heads=2, causal=True, rotary=True, qkv_bias=False, dtype=F64)
    dense.load_state_dict({**mixer.state_dict(), "out.bias": torch.zeros(16, dtype=F64)})
    x = torch.randn(2, 20, 16, dtype=F64)
    torch.testing.assert_close(mixer(x), dense(x))


def test_groups_of_one_are_dense_without_overlap():
    options = {"heads": 2, "group_size": 1, "window": 3, "dtype": F64}
    mixer = CoreContextAwareAttention(8, overlap=False, **options)
    dense = CoreContextAwareAttention(8, **{**options, "window": 30})
    dense.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 25, 8, dtype=F64)
    torch.testing.assert_close(mixer(x), dense(x))
    twice = CoreContextAwareAttention(8, overlap=True, **options)
    twice.load_state_dict(mixer.state_dict())
    assert (twice(x) - dense(x)).abs().max() > 1e-3


def test_core_of_equal_tokens_is_the_token():
    key, value = torch.randn(1, 2, 1, 4, dtype=F64), torch.randn(1, 2, 1, 3, dtype=F64)
    cores = core_tokens(torch.randn(1, 4, 1, 4, dtype=F64), key.expand(1, 2, 5, 4), value.expand(1, 2, 5, 3))
    torch.testing.assert_close(cores, (key, value))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("base", [0, 5])
def test_pattern(overlap, base):
    g, s, cores, n = 3, 4, 9, 30
    pattern = CoreContext(cores, g, s, overlap, base)
    mask = pattern.mask(n - base, cores + n - base, query_offset=base)[0, 0]
    for row in range(n - base):
        t = row + base + 1
        seen = max(0, (t - s) // g)
        first = max(1, seen * g + (0 if overlap or not seen else 1))
        expected = set(range(min(seen, cores))) | {
            cores + j - 1 - base for j in range(first, t + 1) if j - 1 >= base
        }
        assert set(mask[row].nonzero()[:, 0].tolist()) == expected
    for size in ((1, 1), (4, 5), (7, 8)):
        table = pattern.block_table(n - base, cores + n - base, block_size=size, query_offset=base)
        assert torch.equal(table.dense()[0, 0], mask)
    q, k, v = (torch.randn(1, 1, m, 4, dtype=F64) for m in (n - base, *[cores + n - base] * 2))
    results = [
        heedful.attention(q, k, v, pattern=pattern, query_offset=base, backend=backend)
        for backend in ("reference", "tiled")
    ]
    torch.testing.assert_close(*results)


def test_state_keeps_the_window_and_the_cores():
    mixer = CoreContextAwareAttention(8, heads=2, group_size=4, window=8, dtype=F64)
    x = torch.randn(1, 103, 8, dtype=F64)
    whole, state, parts = mixer(x), mixer.init_state(1), []
    for piece in x.split([41, 1, 0, 7, 1, 1, 1, 51], 1):
        y, state = mixer(piece, state=state)
        parts.append(y)
        assert state.key.shape[2] <= 8 + 4
        assert state.core_key.shape[2] == state.length // 4
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_rows_with_different_numbers_of_tokens():
    mixer = CoreContextAwareAttention(8, heads=2, group_size=3, window=4, dtype=F64)
    x = torch.randn(3, 29, 8, dtype=F64)
    mask = torch.rand(3, 29) < 0.7
    mask[2, :13] = False
    state, parts, place = mixer.init_state(3), [], 0
    for piece in x.split([9, 1, 1, 12, 6], 1):
        y, state = mixer(piece, mask=mask[:, place : place + piece.shape[1]], state=state)
        parts.append(y)
        place += piece.shape[1]
    y = torch.cat(parts, 1)
    for b in range(3):  # positions turn by differences, which padding changes: they are told
        at = mask[b].nonzero()[:, 0]
        torch.testing.assert_close(y[b, at], mixer(x[b : b + 1, at], positions=at)[0])


def test_parameter_count():
    assert sum(p.numel() for p in CoreContextAwareAttention(64, heads=8, kv_heads=2).parameters()) == (
        2 * 64 * 64 + 2 * 64 * 16
    )


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="group_size is 0"):
        CoreContextAwareAttention(16, group_size=0)
    with pytest.raises(ValueError, match="must be even for the rotary"):
        CoreContextAwareAttention(9, heads=3)
    with pytest.raises(ValueError, match="a divisor of its 7 tokens"):
        core_tokens(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 7, 4), torch.zeros(1, 1, 7, 4))
