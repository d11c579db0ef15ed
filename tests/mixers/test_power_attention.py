"""PowerAttention: a literal transcription, reach over depth, identity with dense attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.power_attention import PowerAttention


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
