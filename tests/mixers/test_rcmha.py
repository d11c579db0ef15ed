"""RCMHA: the card pair by pair, identities with plain attention, memory, many rows at a time."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.heads import rcmha
from heedful.mixers.heads.rcmha import RelativeConvMultiHeadAttention
from heedful.mixers.heads.self_attention import SelfAttention


def literal(mixer, x, source):
    """The card's steps, score by score."""
    h, d, p = mixer.heads, mixer.head_dim, mixer.max_length
    queries, keys = x.shape[1], source.shape[1]

    def convolved(z, conv):
        z = z.unflatten(-1, (h, d))
        w, b = conv.weight[:, 0], conv.bias
        zero = torch.zeros_like(z[:, 0])
        past = [zero, zero, *z.unbind(1)]
        return [
            b + w[:, 0] * past[t] + w[:, 1] * past[t + 1] + w[:, 2] * past[t + 2] for t in range(z.shape[1])
        ]

    q = convolved(mixer.query(x), mixer.query_conv)
    k = convolved(mixer.key(source), mixer.key_conv)
    v = convolved(mixer.value(source), mixer.value_conv)
    rows = []
    for i in range(queries):
        scores, seen = [], []
        for j in range(keys):
            r = j - (keys - queries) - i
            if mixer.causal and r > 0:
                continue
            s = ((q[i] + mixer.query_bias) * k[j]).sum(-1) + (q[i] * mixer.position[p + r]).sum(-1)
            scores.append((s + mixer.position_bias[p + r]) / d**0.5)
            seen.append(v[j])
        weights = torch.stack(scores).softmax(0)
        rows.append(mixer.out(sum(a[..., None] * o for a, o in zip(weights, seen, strict=True)).flatten(1)))
    return torch.stack(rows, 1)


def make(seed=0, **options):
    torch.manual_seed(seed)
    mixer = RelativeConvMultiHeadAttention(
        8, heads=2, dtype=torch.float64, **{"max_length": 12, "dropout": 0.0, **options}
    )
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("memory", [None, 0, 4])
@pytest.mark.parametrize("rows", [2, 3, 512])
def test_equals_the_card(monkeypatch, causal, memory, rows):
    monkeypatch.setattr(rcmha, "ROWS", rows)
    mixer = make(causal=causal)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    past = torch.randn(2, memory or 0, 8, dtype=torch.float64, requires_grad=True)
    source = torch.cat([past, x], 1)
    ours = mixer(x) if memory is None else mixer(x, context=source)
    expected = literal(mixer, x, source)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, past, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs, materialize_grads=True)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("causal", [False, True])
def test_without_convolution_and_positions_it_is_multi_head_attention(causal):
    mixer = make(causal=causal)
    plain = SelfAttention(8, heads=2, causal=causal, dtype=torch.float64)
    with torch.no_grad():
        for conv in (mixer.query_conv, mixer.key_conv, mixer.value_conv):
            conv.weight.copy_(torch.tensor([0.0, 0.0, 1.0]).expand(4, 1, 3))
            conv.bias.zero_()
        for p in (mixer.position, mixer.position_bias, mixer.query_bias):
            p.zero_()
        for name in ("query", "key"):
            getattr(plain, name).weight.copy_(getattr(mixer, name).weight)
            getattr(plain, name).bias.zero_()
        for name in ("value", "out"):
            getattr(plain, name).load_state_dict(getattr(mixer, name).state_dict())
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(x))


def test_the_longest_sequence_reaches_every_row_of_the_table_but_one():
    """r runs from 1 - P to P - 1 without causality: row 0 of the tables alone is never read."""
    mixer = make(causal=False, max_length=5)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(mixer(x).square().sum(), mixer.position_bias)
    assert (grad != 0).any(1).tolist() == [False] + [True] * 9


def test_left_padding_is_as_no_padding():
    mixer = make(causal=False)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    padded = torch.cat([torch.randn(2, 3, 8, dtype=torch.float64), x], 1)
    mask = (torch.arange(9) >= 3).expand(2, 9)
    torch.testing.assert_close(mixer(padded, mask=mask)[:, 3:], mixer(x))


def test_parameters():
    """Full size: 2 P tables of H d and H, three biasless or biased projections, shared filters."""
    mixer = RelativeConvMultiHeadAttention(128, device="meta")
    d = 16
    expected = 2 * 4096 * 128 + 2 * 4096 * 8 + 128 + 4 * 128 * 128 + 2 * 128 + 3 * (3 * d + d)
    assert sum(p.numel() for p in mixer.parameters()) == expected
    fresh = RelativeConvMultiHeadAttention(8, heads=2, max_length=4)
    assert not any(p.any() for p in (fresh.position, fresh.position_bias, fresh.query_bias))


def test_decoding_continues_all_three_convolutions():
    mixer = make()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    state, pieces = mixer.init_state(2), []
    for part in x.split((1, 4, 1, 3), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    # batch 2, width 8 over the heads, 8 bytes: keys and values of 9 tokens, two vectors of q, k, v
    assert state.nbytes() == 2 * 8 * 8 * (2 * 9 + 3 * 2)


def test_in_training_weights_are_dropped():
    mixer, x = make(dropout=0.5), torch.randn(1, 9, 8, dtype=torch.float64)
    assert not torch.equal(mixer(x), mixer(x))
    assert torch.equal(mixer.eval()(x), mixer(x))


@pytest.mark.door
def test_door():
    mixer = make()
    x = torch.randn(1, 13, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="x makes a sequence of 13 tokens, must be at most max_length, 12"):
        mixer(x)
    _, state = mixer(x[:, :10], state=mixer.init_state(1))
    with pytest.raises(ValueError, match="x makes a sequence of 13 tokens"):
        mixer(x[:, 10:], state=state)
    with pytest.raises(ValueError, match="context has 13 tokens"):
        mixer(x[:, :2], context=x)
    with pytest.raises(ValueError, match="state is given"):
        mixer(x[:, :2], context=x[:, :4], state=state)
