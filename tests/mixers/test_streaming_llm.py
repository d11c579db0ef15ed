"""StreamingLLM: equality with the authors' loop (evict, then places in the cache), bounded state."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.streaming_llm import StreamingAttention


def turned(x, positions):
    """Rotary embedding, channel j with j + d / 2."""
    d = x.shape[-1]
    angle = positions.to(x.dtype)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    u, v = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


def stream(mixer, x, sinks, recent):
    """Token by token: unrotated cache, positions are cache slots, eviction after each step."""
    b, n, _ = x.shape
    d, repeats = mixer.head_dim, mixer.heads // mixer.kv_heads
    q, k, v = (layer(x).view(b, n, -1, d).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
    cache, rows = [], []
    for i in range(n):
        now = [*cache, i]
        keys, values = k[:, :, now], v[:, :, now]
        query = q[:, :, i : i + 1]
        if mixer.rotary:
            keys = turned(keys, torch.arange(len(now)))
            query = turned(query, torch.tensor([len(cache)]))
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        rows.append(((query @ keys.mT / d**0.5).softmax(-1) @ values)[:, :, 0].flatten(1))
        cache = now if len(now) <= sinks + recent else now[:sinks] + now[len(now) - recent :]
    return mixer.out(torch.stack(rows, 1))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("sinks", "recent"), [(2, 5), (0, 4), (4, 1), (3, 0), (6, 30)])
def test_equals_the_authors_loop(rotary, sinks, recent):
    mixer = StreamingAttention(
        16, heads=4, kv_heads=2, sinks=sinks, window=recent + 1, rotary=rotary, dtype=torch.float64
    )
    x = torch.randn(2, 29, 16, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), stream(mixer, x, sinks, recent)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    for grad, want in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, want)


def test_short_texts_are_dense_attention():
    ours = StreamingAttention(16, heads=4, sinks=3, window=9, rotary=True)
    dense = SelfAttention(16, heads=4, causal=True, rotary=True)
    dense.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 12, 16)  # sinks + window
    torch.testing.assert_close(ours(x), dense(x), rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 30, 16)
    assert (ours(x) - dense(x))[:, 13:].abs().max() > 1e-3


def test_places_in_the_cache_matter():
    """With true positions the sinks would be further away: another result."""
    mixer = StreamingAttention(16, heads=4, sinks=2, window=5, rotary=True)
    true = SelfAttention(16, heads=4, causal=True, rotary=True, pattern=mixer.pattern)
    true.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(1, 40, 16)
    torch.testing.assert_close(mixer(x)[:, :7], true(x)[:, :7], rtol=1e-5, atol=1e-6)
    assert (mixer(x) - true(x))[:, 8:].abs().max() > 1e-4
    plain = StreamingAttention(16, heads=4, sinks=2, window=5)
    masked = SelfAttention(16, heads=4, causal=True, pattern=mixer.pattern)
    masked.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), masked(x), rtol=1e-5, atol=1e-6)


def test_state_is_bounded_and_keeps_the_sinks():
    mixer = StreamingAttention(16, heads=4, sinks=3, window=6, rotary=True)
    x = torch.randn(2, 50, 16)
    state, pieces, sizes = mixer.init_state(2), [], []
    for part in x.split((2, 7, 1, 20, 1, 19), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
        sizes.append(state.key.shape[2])
    assert sizes == [2, 8, 8, 8, 8, 8]
    assert state.length == 50
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x), rtol=1e-4, atol=1e-5)
    _, first = mixer(x[:, :3], state=mixer.init_state(2))
    torch.testing.assert_close(state.key[:, :, :3], first.key)
    torch.testing.assert_close(state.value[:, :, :3], first.value)


def test_defaults():
    mixer = StreamingAttention(16, heads=4)
    assert mixer.sinks + mixer.window - 1 == 4 + 1020
    assert sum(p.numel() for p in mixer.parameters()) == 4 * (16 * 16 + 16)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="window is 0"):
        StreamingAttention(16, heads=4, window=0)
    with pytest.raises(ValueError, match="context_mask is given"):
        StreamingAttention(16, heads=4)(
            torch.randn(1, 3, 16), context_mask=torch.ones(1, 3, dtype=torch.bool)
        )
