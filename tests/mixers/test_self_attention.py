"""Self-attention: against loops, torch's own module, and its decoding against the full pass."""

from __future__ import annotations

import math

import pytest
import torch

from heedful import patterns as p
from heedful.mixers.heads.self_attention import SelfAttention


def by_hand(mixer, x, context=None, seen=None, positions=None):
    """y by loops over batch rows, heads and queries; seen(b, i, j) says whether i sees j."""
    source = x if context is None else context
    d, repeats = mixer.head_dim, mixer.heads // mixer.kv_heads

    def linear(layer, z):
        return z @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    def turn(row, position):
        half = d // 2
        out = []
        for j in range(d):
            angle = position * 10000 ** (-2 * (j % half) / d)
            other = -row[j + half] if j < half else row[j - half]
            out.append(row[j] * math.cos(angle) + other * math.sin(angle))
        return torch.stack(out)

    q, k, v = linear(mixer.query, x), linear(mixer.key, source), linear(mixer.value, source)
    rows = []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            parts = []
            for h in range(mixer.heads):
                g = h // repeats
                columns = [j for j in range(source.shape[1]) if seen is None or seen(b, i, j)]
                if not columns:
                    parts.append(x.new_zeros(d))
                    continue
                query = q[b, i, h * d : (h + 1) * d]
                keys = [k[b, j, g * d : (g + 1) * d] for j in columns]
                if mixer.rotary and context is None:
                    at = range(x.shape[1]) if positions is None else positions.tolist()
                    query = turn(query, at[i])
                    keys = [turn(key, at[j]) for key, j in zip(keys, columns, strict=True)]
                weights = torch.stack([query @ key for key in keys]).div(math.sqrt(d)).softmax(0)
                values = torch.stack([v[b, j, g * d : (g + 1) * d] for j in columns])
                parts.append(weights @ values)
            rows.append(linear(mixer.out, torch.cat(parts)))
    return torch.stack(rows).view_as(x)


def build(**options):
    torch.manual_seed(0)
    return SelfAttention(**{"dim": 12, "heads": 4, "head_dim": 4, "dtype": torch.float64, **options})


def same_with_gradients(mixer, ours, expected, x):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs, retain_graph=True, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs, materialize_grads=True)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_equals_loops(kv_heads, causal, rotary):
    mixer = build(kv_heads=kv_heads, causal=causal, rotary=rotary)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    expected = by_hand(mixer, x, seen=lambda b, i, j: j <= i or not causal)
    same_with_gradients(mixer, mixer(x), expected, x)


def test_a_pattern_is_a_mixer_and_joins_with_causal_and_mask():
    mixer = build(causal=True, pattern=p.Window(2), kv_heads=2, qkv_bias=False)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 7) < 0.6
    mask[0, :2] = False  # tokens 0 and 1 of row 0 see nothing

    expected = by_hand(mixer, x, seen=lambda b, i, j: bool(i - 2 <= j <= i and mask[b, j]))
    ours = mixer(x, mask=mask)
    same_with_gradients(mixer, ours, expected, x)
    torch.testing.assert_close(ours[0, 0], mixer.out.bias)


def test_context():
    mixer = build(causal=True, rotary=True, pattern=p.Window(1))
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 6, 12, dtype=torch.float64)
    context_mask = torch.rand(2, 6) < 0.5
    context_mask[:, 0] = True
    expected = by_hand(mixer, x, context, lambda b, i, j: bool(context_mask[b, j]))
    same_with_gradients(mixer, mixer(x, context=context, context_mask=context_mask), expected, x)


def test_positions():
    mixer = build(rotary=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    positions = torch.tensor([3, 0, 7, 7, 2])
    torch.testing.assert_close(mixer(x, positions=positions), by_hand(mixer, x, positions=positions))
    torch.testing.assert_close(mixer(x, positions=positions.expand(2, 5)), mixer(x, positions=positions))
    torch.testing.assert_close(mixer(x, positions=torch.arange(5) + 90), mixer(x))  # distances alone count


@pytest.mark.parametrize("cuts", [(9,), (1,) * 9, (4, 1, 4), (0, 3, 6)])
@pytest.mark.parametrize("pattern", [None, p.Window(3) | p.Sink(1)])
def test_pieces_equal_the_whole(cuts, pattern):
    mixer = build(causal=True, rotary=True, kv_heads=2, pattern=pattern)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 2:4] = False
    state, pieces = mixer.init_state(2), []
    for part, seen in zip(x.split(cuts, 1), mask.split(cuts, 1), strict=True):
        y, state = mixer(part, mask=seen, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x, mask=mask))
    assert state.length == 9
    assert state.key.shape == (2, 2, 9, 4)


def test_equals_torch():
    mixer = SelfAttention(16, heads=4, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    layers = [mixer.query, mixer.key, mixer.value]
    theirs.in_proj_weight.data = torch.cat([layer.weight for layer in layers])
    theirs.in_proj_bias.data = torch.cat([layer.bias for layer in layers])
    theirs.out_proj.load_state_dict(mixer.out.state_dict())
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), theirs(x, x, x)[0])


def test_parameter_counts():
    def count(**options):
        return sum(q.numel() for q in SelfAttention(64, heads=8, **options).parameters())

    assert count() == 4 * 64 * 65
    assert count(kv_heads=2) == 2 * 64 * 65 + 2 * 16 * 65
    assert count(kv_heads=1, qkv_bias=False) == 64 * 64 + 2 * 8 * 64 + 64 * 65
    assert count(head_dim=16) == 3 * 128 * 65 + 64 * 129


def test_dropout_acts_on_the_weights_in_training_alone():
    torch.manual_seed(0)
    mixer = SelfAttention(8, heads=2, dropout=0.5)
    x = torch.randn(1, 6, 8)
    assert torch.equal(mixer.eval()(x), mixer(x))
    mixer.train()
    mean = mixer(x.expand(4000, 6, 8)).mean(0, keepdim=True)
    torch.testing.assert_close(mean, mixer.eval()(x), rtol=0, atol=0.03)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="kv_heads is 3"):
        SelfAttention(16, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="heads is 5"):
        SelfAttention(16, heads=5)
    with pytest.raises(ValueError, match="head_dim is 3"):
        SelfAttention(16, heads=4, head_dim=3, rotary=True)
    with pytest.raises(ValueError, match="causal is False"):
        SelfAttention(16).init_state(1)
    mixer = SelfAttention(16, causal=True)
    x = torch.zeros(2, 3, 16)
    with pytest.raises(ValueError, match="state is given"):
        mixer(x, context=x, state=mixer.init_state(2))
    with pytest.raises(ValueError, match="context has batch 1"):
        mixer(x, context=x[:1])
    with pytest.raises(ValueError, match="context_mask is given"):
        mixer(x, context_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="positions has shape"):
        mixer(x, positions=torch.arange(4))
