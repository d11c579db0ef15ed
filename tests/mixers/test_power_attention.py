"""PowerAttention: a literal transcription, reach over depth, identity with dense attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.bench.tasks import IGNORE, Recall
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.power_attention import PowerAttention
from heedful.patterns import Causal, Window


def literal(mixer, x, window, sinks, block):
    """Query by query, over a list of the keys that the card keeps."""
    b, n, _ = x.shape
    d, repeats = mixer.head_dim, mixer.heads // mixer.kv_heads
    q, k, v = (layer(x).view(b, n, -1, d).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
    powers = [2**e for e in range(20)]
    rows = []
    for i in range(n):
        kept = [
            j
            for j in range(i + 1)
            if j // block < sinks or i // block - j // block < window or i // block - j // block in powers
        ]
        keys, values = (y[:, :, kept].repeat_interleave(repeats, 1) for y in (k, v))
        weights = torch.einsum("bhd,bhkd->bhk", q[:, :, i], keys).div(d**0.5).softmax(-1)
        rows.append(torch.einsum("bhk,bhkd->bhd", weights, values).flatten(1))
    return mixer.out(torch.stack(rows, 1))


@pytest.mark.parametrize(("window", "sinks", "block"), [(1, 0, 1), (2, 1, 3), (1, 1, 4)])
def test_equals_the_card(window, sinks, block):
    mixer = PowerAttention(
        16, heads=4, kv_heads=2, window=window, sinks=sinks, block_size=block, dtype=torch.float64
    )
    x = torch.randn(2, 37, 16, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), literal(mixer, x, window, sinks, block)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    for grad, want in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, want)


def test_few_tokens_are_dense_attention():
    ours = PowerAttention(16, heads=4, block_size=8, rotary=True)
    dense = SelfAttention(16, heads=4, causal=True, rotary=True)
    dense.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 40, 16)  # 5 blocks, the window
    torch.testing.assert_close(ours(x), dense(x))
    x = torch.randn(2, 80, 16)
    assert (ours(x) - dense(x))[:, 64:].abs().max() > 1e-3


def test_layers_double_the_reach():
    """Token 0 moves the last output over popcount(distance) layers and no fewer."""
    layers = [
        PowerAttention(8, heads=1, window=1, sinks=0, block_size=1, dtype=torch.float64) for _ in range(4)
    ]
    for distance in (1, 3, 5, 7, 8, 11, 15):
        x = torch.randn(1, distance + 1, 8, dtype=torch.float64, requires_grad=True)
        for depth in range(1, 5):
            y = x
            for layer in layers[:depth]:
                y = y + layer(F.layer_norm(y, (8,)))
            (grad,) = torch.autograd.grad(y[0, -1].square().sum(), x)
            assert bool(grad[0, 0].abs().max() > 0) == (depth >= distance.bit_count())


def test_parameters_and_state():
    mixer = PowerAttention(16, heads=4, kv_heads=2)
    assert sum(p.numel() for p in mixer.parameters()) == sum(
        p.numel() for p in SelfAttention(16, heads=4, kv_heads=2).parameters()
    )
    _, state = mixer(torch.randn(2, 9, 16), state=mixer.init_state(2))
    assert state.nbytes() == 2 * 2 * 2 * 9 * 4 * 4


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="context is given"):
        PowerAttention(16, heads=4)(torch.randn(1, 3, 16), context=torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="window is 0"):
        PowerAttention(16, heads=4, window=0)


@torch.no_grad()
def answered(task, layers, window=None):
    """Share of the questions of `recall` that are answered after each layer, with weights set by hand.

    Head k carries the value of key k: every token hands on what it knows, and asks all that it sees. With a
    window the same weights attend to the last `window` keys.
    """
    keys, width = task.keys, 1 + task.values  # channel 0 of a head: its key's value is known
    mixer = PowerAttention(keys * width, heads=keys, window=1, sinks=0, block_size=4)
    if window is not None:
        mixer.pattern = Causal() & Window(window - 1, 0)
    for p in mixer.parameters():
        p.zero_()
    mixer.query.bias.view(keys, width)[:, 0] = 30 * width**0.5  # tokens that know take all the weight
    for layer in (mixer.key, mixer.value, mixer.out):
        layer.weight.copy_(torch.eye(keys * width))
    tokens, targets = task.batch(torch.Generator().manual_seed(0))
    known = torch.zeros(*tokens.shape, keys, width)
    row, place = torch.arange(len(tokens))[:, None], torch.arange(1, 2 * task.pairs, 2)
    key, value = tokens[:, place - 1] - 1, tokens[:, place] - 1 - keys
    known[row, place, key, 0] = 1
    known[row, place, key, 1 + value] = 1
    b, i = (targets != IGNORE).nonzero(as_tuple=True)
    shares = []
    for _ in range(layers):
        known = (known + mixer(known.flatten(2)).view_as(known)).clamp(max=1)
        answer = known[b, i, tokens[b, i] - 1]
        right = (answer[:, 0] > 0.5) & (answer[:, 1:].argmax(-1) == targets[b, i] - 1 - keys)
        shares.append(float(right.float().mean()))
    return shares


def test_pairs_pass_from_hop_to_hop_where_a_window_of_the_same_cost_ends():
    task = Recall(length=256, pairs=8, batch_size=4)
    cost = PowerAttention(16, window=1, sinks=0, block_size=4).pattern.mask(256, 256).sum(-1)
    mean, most = round(float(cost.float().mean())), int(cost.max())
    assert (mean, most) == (23, 28)
    power = answered(task, 6)
    assert power[0] < 0.12
    assert power[4] > 0.98
    assert power[5] == 1.0
    # With any weights: what lies farther than six windows back cannot be known.
    assert answered(task, 6, window=mean)[5] < 0.6
    assert answered(task, 6, window=most)[5] < 0.75
