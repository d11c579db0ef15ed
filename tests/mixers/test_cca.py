"""Compressed convolutional attention: the card token by token, its lengths and reaches, its parameters."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.heads.cca import CompressedConvolutionalAttention


def literal(mixer, x, window=None):
    """The card's steps for one sequence (n, c), token by token and head by head."""
    h, g, d, n = mixer.heads, mixer.kv_heads, mixer.head_dim, len(x)
    r, channels = h // g, (h + g) * d
    k1, k2 = mixer.channel_conv.weight.shape[-1], mixer.head_conv.weight.shape[-1]
    qp, kp = mixer.query(x).view(n, h, d), mixer.key(x).view(n, g, d)
    # 2. means of the projections
    mq = torch.stack([(qp[:, i] + kp[:, i // r]) / 2 for i in range(h)], 1)
    mk = torch.stack([mq[:, i * r : (i + 1) * r].mean(1) for i in range(g)], 1)
    # 3. convolutions over one stretch of zeros and tokens
    reach = k1 + k2 - 2
    joined = torch.cat([qp.flatten(1), kp.flatten(1)], 1)
    z = torch.cat([x.new_zeros(reach, channels), joined])
    w1, b1 = mixer.channel_conv.weight[:, 0], mixer.channel_conv.bias
    first = [b1 + sum(w1[:, s] * z[t + s] for s in range(k1)) for t in range(len(z) - k1 + 1)]
    w2 = mixer.head_conv.weight.view(h + g, d, d, k2)
    b2 = mixer.head_conv.bias.view(h + g, d)
    second = [
        b2 + sum(torch.einsum("aoi,ai->ao", w2[..., s], first[t + s].view(h + g, d)) for s in range(k2))
        for t in range(n)
    ]
    conv = torch.stack(second)
    # 4., 5. sum and length
    q, k = conv[:, :h] + mq, conv[:, h:] + mk
    q = q / q.square().sum(-1, keepdim=True).sqrt() * d**0.5
    k = k / k.square().sum(-1, keepdim=True).sqrt() * d**0.5 * mixer.temp[:, None]
    # 6. rotary embedding of the first channels
    pairs = mixer.rotary_dim // 2
    angle = torch.arange(n, dtype=x.dtype)[:, None, None] * mixer.rotary_base ** (
        -torch.arange(pairs, dtype=x.dtype) / pairs
    )

    def turned(y):
        u, v, rest = y[..., :pairs], y[..., pairs : 2 * pairs], y[..., 2 * pairs :]
        return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin(), rest], -1)

    q, k = turned(q), turned(k)
    # 7. half of the values from the token before
    late = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    v = torch.cat([mixer.value(x), mixer.value_delayed(late)], -1).view(n, g, d)
    # 8., 9. causal attention
    rows = []
    for t in range(n):
        near = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        heads = [((k[near, i // r] @ q[t, i]) / d**0.5).softmax(0) @ v[near, i // r] for i in range(h)]
        rows.append(torch.cat(heads) @ mixer.out.weight.T)
    return torch.stack(rows)


def make(**options):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 4, "rotary_base": 50.0}
    mixer = CompressedConvolutionalAttention(24, dtype=torch.float64, **{**sizes, **options})
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 3, "kv_heads": 1},
        {"heads": 2, "kv_heads": 2, "rotary_fraction": 1.0},
        {"channel_kernel": 3, "head_kernel": 4},
        {"channel_kernel": 1, "head_kernel": 1, "qkv_bias": True},
        {"window": 3},
    ],
)
def test_equals_the_card(options):
    mixer = make(**options)
    x = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), torch.stack([literal(mixer, row, options.get("window")) for row in x])
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want)


def test_decoding_with_a_window():
    mixer, x = make(window=2), torch.randn(2, 6, 24, dtype=torch.float64)
    state, pieces = mixer.init_state(2), []
    for part in x.split((3, 1, 2), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))


def test_lengths_of_queries_and_keys():
    mixer, x = make(), torch.randn(2, 6, 24, dtype=torch.float64)
    query, key = mixer.normalise(*mixer.project(x)[:2])
    torch.testing.assert_close(query.norm(dim=-1), torch.full((2, 4, 6), 2.0, dtype=torch.float64))
    torch.testing.assert_close(key.norm(dim=-1), (2 * mixer.temp.abs())[:, None].expand(2, 2, 6))


def test_reach():
    """q and k of token t come from tokens t - 2 to t; of v, one KV head from t and one from t - 1."""
    mixer, t = make(), 4
    x = torch.randn(1, 7, 24, dtype=torch.float64, requires_grad=True)

    def seen(y):
        (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        return grad[0].any(-1).nonzero().flatten().tolist()

    query, key, value, _, _ = mixer.project(x)
    assert seen(query[:, :, t]) == seen(key[:, :, t]) == [2, 3, 4]
    assert seen(value[:, 0, t]) == [4]
    assert seen(value[:, 1, t]) == [3]
    assert seen(mixer(x)[:, t]) == [0, 1, 2, 3, 4]


def test_without_convolutions_and_groups_queries_are_keys():
    mixer = make(kv_heads=4)
    with torch.no_grad():
        for p in (*mixer.channel_conv.parameters(), *mixer.head_conv.parameters()):
            p.zero_()
    query, key = mixer.normalise(*mixer.project(torch.randn(2, 6, 24, dtype=torch.float64))[:2])
    torch.testing.assert_close(key, query * mixer.temp[:, None, None])


@pytest.mark.parametrize(("e", "h", "g", "d", "k1", "k2"), [(2048, 8, 2, 128, 2, 2), (64, 6, 3, 8, 3, 4)])
def test_parameters(e, h, g, d, k1, k2):
    mixer = CompressedConvolutionalAttention(
        e, heads=h, kv_heads=g, head_dim=d, channel_kernel=k1, head_kernel=k2, device="meta"
    )
    expected = (
        e * (h + g) * d + e * g * d + (h + g) * d * (k1 + 1) + (h + g) * d * (d * k2 + 1) + g + h * d * e
    )
    assert sum(p.numel() for p in mixer.parameters()) == expected


def test_temperatures_start_at_one():
    assert torch.equal(CompressedConvolutionalAttention(24, head_dim=4).temp, torch.ones(2))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_decoding_keeps_the_compressed_heads_and_two_short_memories(qkv_bias):
    mixer, x = make(qkv_bias=qkv_bias), torch.randn(2, 7, 24, dtype=torch.float64)
    state, pieces = mixer.init_state(2), []
    for part in x.split((1, 3, 1, 2), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    # batch 2, 8 bytes; 2 g d a token, (h + g) d of two columns, g d / 2 of the last token
    assert state.nbytes() == 2 * 8 * (7 * 2 * 8 + 2 * 24 + 4)


def test_left_padding_is_as_no_padding():
    mixer, x = make(), torch.randn(2, 6, 24, dtype=torch.float64)
    padded = torch.cat([torch.randn(2, 3, 24, dtype=torch.float64), x], 1)
    mask = (torch.arange(9) >= 3).expand(2, 9)
    positions = torch.arange(-3, 6)
    torch.testing.assert_close(mixer(padded, mask=mask, positions=positions)[:, 3:], mixer(x))


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="kv_heads is 3, must divide heads"):
        make(kv_heads=3)
    with pytest.raises(ValueError, match="head_dim is 5, kv_heads \\* head_dim must be even"):
        make(heads=1, kv_heads=1, head_dim=5)
    with pytest.raises(ValueError, match="rotary_fraction is 0\\.25, must turn an even number of 4"):
        make(rotary_fraction=0.25)
