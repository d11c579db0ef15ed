"""Grouped differential attention: head by head in loops, limits without noise, growth by repeated heads."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.mixers.heads.grouped_differential_attention import GroupedDifferentialAttention, depth_lambda
from heedful.ops.attention import attention
from heedful.patterns.causal import Causal


def turned(z, base):
    """Rotary embedding of (n, d), channel j with j + d / 2."""
    n, d = z.shape
    angle = torch.arange(n, dtype=z.dtype)[:, None] * base ** (-torch.arange(0, d, 2, dtype=z.dtype) / d)
    u, v = z[:, : d // 2], z[:, d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


def literal(mixer, x):
    """The card's steps, one batch row and one head at a time."""
    d, r, pairs = mixer.head_dim, mixer.ratio, mixer.kv_heads // 2
    signal_heads = mixer.heads - mixer.noise_heads
    lam = (
        (mixer.lambda_q1 @ mixer.lambda_k1).exp()
        - (mixer.lambda_q2 @ mixer.lambda_k2).exp()
        + mixer.lambda_init
    )
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    rows = []
    for row in x:
        q, k, v = ((layer(row)).split(d, -1) for layer in (mixer.query, mixer.key, mixer.value))
        if mixer.rotary_base is not None:
            q, k = ([turned(z, mixer.rotary_base) for z in y] for y in (q, k))

        def softmaxed(query, key):
            logits = query @ key.T * d**-0.5
            return (logits.masked_fill(hidden, -torch.inf) if mixer.causal else logits).softmax(-1)

        outs = []
        for a in range(signal_heads):
            b = a // r
            g1, g2 = a // (signal_heads // pairs), b // (mixer.noise_heads // pairs)
            a1 = softmaxed(q[b * (r + 1) + a % r], k[2 * g1])
            a2 = softmaxed(q[b * (r + 1) + r], k[2 * g2 + 1])
            o1 = torch.cat([a1 @ v[2 * g1], a1 @ v[2 * g1 + 1]], -1)
            o2 = torch.cat([a2 @ v[2 * g2], a2 @ v[2 * g2 + 1]], -1)
            o = o1 - lam * o2
            o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
            outs.append(o * (1 - mixer.lambda_init))
        rows.append(torch.cat(outs, -1) @ mixer.out.weight.T)
    return torch.stack(rows)


def make(**options):
    mixer = GroupedDifferentialAttention(24, head_dim=4, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


@pytest.mark.parametrize(
    ("heads", "noise_heads", "kv_heads"), [(8, 2, 4), (8, 4, 4), (8, 2, 2), (6, 1, 2), (4, None, None)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_card(heads, noise_heads, kv_heads, causal):
    mixer = make(
        heads=heads,
        noise_heads=noise_heads,
        kv_heads=kv_heads,
        causal=causal,
        lambda_init=depth_lambda(1),
        rotary_base=100.0 if causal else None,
    )
    x = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), literal(mixer, x)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want)


def test_as_many_noise_as_signal_heads_is_differential_attention():
    """(softmax(q1 k1^T) - lambda softmax(q2 k2^T)) [v1, v2], one weight matrix a head."""
    mixer = make(heads=4, kv_heads=4, rotary_base=None)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    q, k, v = (layer(x)[0].view(5, 2, 2, 4) for layer in (mixer.query, mixer.key, mixer.value))
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    logits = torch.einsum("ihsd,jhsd->shij", q, k) / 2
    signal, noise = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    o = torch.einsum("hij,jhe->ihe", signal - mixer.lambda_full() * noise, v.flatten(2))
    torch.testing.assert_close(mixer(x)[0], mixer.out((mixer.norm(o) * 0.8).flatten(1)))


def test_without_noise_it_is_attention_with_double_values():
    mixer = make(heads=6, noise_heads=2, kv_heads=4, rotary_base=None)
    with torch.no_grad():
        mixer.lambda_q1.zero_()
        mixer.lambda_k2.copy_(
            mixer.lambda_q2 / mixer.lambda_q2.square().sum() * math.log(1 + mixer.lambda_init)
        )
    torch.testing.assert_close(mixer.lambda_full(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = (
        layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value)
    )
    o = attention(q[:, [0, 1, 3, 4]], k[:, ::2], torch.cat([v[:, ::2], v[:, 1::2]], -1), pattern=Causal())
    expected = mixer.out((mixer.norm(o) * (1 - mixer.lambda_init)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x), expected)


def test_repeated_signal_heads_leave_the_function_as_it_was():
    """Twice as many signal heads, their part of W_o halved: the noise heads now serve groups of four."""
    small = make(heads=6, noise_heads=2, kv_heads=4)
    large = make(heads=10, noise_heads=2, kv_heads=4)
    weights = small.state_dict()
    query = weights["query.weight"].view(2, 3, 4, 24)
    out = weights["out.weight"].view(24, 2, 2, 8)
    weights["query.weight"] = query[:, [0, 0, 1, 1, 2]].reshape(40, 24)
    weights["out.weight"] = (out[:, :, [0, 0, 1, 1]] / 2).reshape(24, 64)
    large.load_state_dict(weights, strict=True)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(large(x), small(x))


@pytest.mark.parametrize(("heads", "noise_heads", "kv_heads"), [(8, 2, 4), (80, 16, 16), (4, 2, 4)])
def test_parameters(heads, noise_heads, kv_heads):
    mixer = GroupedDifferentialAttention(
        32, heads=heads, noise_heads=noise_heads, kv_heads=kv_heads, head_dim=8, device="meta"
    )
    h, g, h1, d = heads, kv_heads, heads - noise_heads, 8
    expected = 32 * (h + 2 * g) * d + 2 * h1 * d * 32 + 4 * d + 2 * d
    assert sum(p.numel() for p in mixer.parameters()) == expected


def test_lambda_of_depth():
    assert depth_lambda(0) == pytest.approx(0.2)
    assert depth_lambda(-1) == pytest.approx(-0.0099, abs=1e-4)  # Motif's first layer
    assert depth_lambda(2) == pytest.approx(0.8 - 0.6 * math.exp(-0.6))


def test_decoding_keeps_all_kv_heads():
    mixer = make(heads=8, noise_heads=2, kv_heads=4)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    state, pieces = mixer.init_state(2), []
    for part in x.split((3, 1, 1, 2), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    assert state.nbytes() == 2 * 2 * 4 * 7 * 4 * 8  # key and value, batch, kv heads, tokens, width, bytes


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="noise_heads is 3, must divide heads - noise_heads"):
        GroupedDifferentialAttention(24, heads=8, noise_heads=3)
    with pytest.raises(ValueError, match="heads is 2, must be more than noise_heads"):
        GroupedDifferentialAttention(24, heads=2, noise_heads=2)
    for kv_heads in (3, 8):
        with pytest.raises(ValueError, match=f"kv_heads is {kv_heads}, must be even"):
            GroupedDifferentialAttention(24, heads=8, noise_heads=2, kv_heads=kv_heads)
