"""Long-short attention: a literal transcription and the identities of the card."""

from __future__ import annotations

import pytest
import torch

import heedful
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.ls_attention import LongShortAttention


def literal(mixer, x):
    b, n, _ = x.shape
    d = mixer.head_dim
    q, k, v = (layer(x).view(b, n, -1, d).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
    out = torch.zeros_like(q)
    for h in range(mixer.heads):
        for i in range(n):
            reach = mixer.window if h < mixer.local_heads else n
            keys = [j for j in range(n) if abs(i - j) < reach and (j <= i or not mixer.causal)]
            weights = torch.einsum("bd,bkd->bk", q[:, h, i], k[:, h, keys]).div(d**0.5).softmax(-1)
            out[:, h, i] = torch.einsum("bk,bkd->bd", weights, v[:, h, keys])
    return mixer.out(out.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("local_heads", "window"), [(None, 3), (1, 1), (3, 5), (4, 2)])
def test_equals_the_card(causal, local_heads, window):
    mixer = LongShortAttention(
        16, heads=4, local_heads=local_heads, window=window, causal=causal, dtype=torch.float64
    )
    x = torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), literal(mixer, x)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    for grad, want in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize(("local_heads", "window"), [(0, 2), (2, 13), (4, 20)])
@pytest.mark.parametrize("causal", [True, False])
def test_is_plain_attention(local_heads, window, causal):
    ours = LongShortAttention(16, heads=4, local_heads=local_heads, window=window, causal=causal, rotary=True)
    plain = SelfAttention(16, heads=4, causal=causal, rotary=True)
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 13, 16)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)


def test_local_heads_of_window_one_give_their_values():
    mixer = LongShortAttention(16, heads=4, local_heads=4, window=1)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(mixer(x), mixer.out(mixer.value(x)))


def test_a_token_moves_local_heads_in_its_window_alone():
    mixer = LongShortAttention(16, heads=4, local_heads=4, window=3)
    x, other = torch.randn(1, 12, 16), torch.randn(1, 16)
    changed = x.clone()
    changed[:, 5] = other
    moved = (mixer(x) - mixer(changed)).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [5, 6, 7]


def test_pattern_says_the_same():
    mixer = LongShortAttention(16, heads=4, window=3)
    x = torch.randn(2, 11, 16)
    q, k, v = (layer(x).view(2, 11, 4, 4).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
    heads = heedful.attention(q, k, v, pattern=mixer.pattern)
    torch.testing.assert_close(mixer(x), mixer.out(heads.transpose(1, 2).reshape(2, 11, 16)))


def test_state():
    mixer = LongShortAttention(16, heads=4, local_heads=3, window=4)
    _, state = mixer(torch.randn(2, 50, 16), state=mixer.init_state(2))
    assert state.local_key.shape == (2, 3, 3, 4)
    assert state.key.shape == (2, 1, 50, 4)
    assert state.nbytes() == 2 * 2 * 4 * 4 * (3 * 3 + 50)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * (16 * 16 + 16)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="local_heads is 5"):
        LongShortAttention(16, heads=4, local_heads=5)
    with pytest.raises(ValueError, match="window is 0"):
        LongShortAttention(16, heads=4, window=0)
