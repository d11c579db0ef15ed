"""MoA's attention: a literal transcription with spans by head, dense attention at its ends."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.moa import MixtureOfSpans
from heedful.mixers.sparse.streaming_llm import StreamingAttention


def literal(mixer, x, alpha, beta, sink, size, length):
    b, n, _ = x.shape
    d, repeats = mixer.head_dim, mixer.heads // mixer.kv_heads
    q, k, v = (layer(x).view(b, n, -1, d).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
    out = torch.zeros_like(q)
    for h in range(mixer.heads):
        g = h // repeats
        for i in range(n):
            blocks = i // size + 1 if length is None else math.ceil(length / size)
            span = max(1, int(alpha[g] // size + beta[g] * blocks))
            keys = [j for j in range(i + 1) if j < sink or i // size - j // size < span]
            weights = torch.einsum("bd,bkd->bk", q[:, h, i], k[:, g, keys]).div(d**0.5).softmax(-1)
            out[:, h, i] = torch.einsum("bk,bkd->bd", weights, v[:, g, keys])
    return mixer.out(out.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("length", [None, 24])
@pytest.mark.parametrize(("sink", "size"), [(4, 2), (0, 1), (3, 3)])
def test_equals_the_card(length, sink, size):
    alpha, beta = (7, -5), (0.0, 0.75)
    mixer = MixtureOfSpans(
        16,
        heads=4,
        kv_heads=2,
        alpha=alpha,
        beta=beta,
        sink=sink,
        block_size=size,
        length=length,
        dtype=torch.float64,
    )
    x = torch.randn(2, 23, 16, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), literal(mixer, x, alpha, beta, sink, size, length)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    for grad, want in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("length", [None, 50])
def test_beta_one_is_dense(length):
    ours = MixtureOfSpans(16, heads=4, alpha=0, beta=1, sink=0, block_size=8, length=length, rotary=True)
    dense = SelfAttention(16, heads=4, causal=True, rotary=True)
    dense.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 50, 16)
    torch.testing.assert_close(ours(x), dense(x))


def test_beta_zero_is_a_sink_and_a_window():
    ours = MixtureOfSpans(16, heads=4, alpha=6, beta=0, sink=4, block_size=1)
    window = StreamingAttention(16, heads=4, sinks=4, window=6)  # without rotary: no position shift
    window.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 40, 16)
    torch.testing.assert_close(ours(x), window(x), rtol=1e-5, atol=1e-6)


def test_a_fixed_length_decodes_as_well():
    """The authors fix N for a prompt and all that will follow; then too pieces equal the whole."""
    mixer = MixtureOfSpans(16, heads=4, alpha=0, beta=0.25, sink=2, block_size=2, length=40)
    x = torch.randn(2, 37, 16)
    state, pieces = mixer.init_state(2), []
    for part in x.split((11, 1, 1, 24), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="alpha has 3 numbers, must have one a KV head, 4"):
        MixtureOfSpans(16, heads=4, alpha=(1, 2, 3))
    with pytest.raises(ValueError, match="sink is 3"):
        MixtureOfSpans(16, heads=4, sink=3, block_size=2)
