from __future__ import annotations

import math

import pytest
import torch
from tests.literal import assert_same_with_gradients, layer_norm, scatter
from torch import Tensor
from torch.testing import assert_close

from heedful.mixers.linear.ninformer import FeedForward, MixerGatingUnit
from heedful.models.ninformer import NiNformer


def build(**arguments) -> MixerGatingUnit:
    torch.manual_seed(0)
    m = MixerGatingUnit(6, **{"length": 5, "hidden": 7, **arguments}, dtype=torch.float64)
    scatter(m)
    return m


def feed(x: Tensor, ff: FeedForward) -> Tensor:
    """One vector, with the exact GELU."""
    h = ff.wide.weight @ x + ff.wide.bias
    return ff.narrow.weight @ (h * (1 + torch.erf(h / math.sqrt(2))) / 2) + ff.narrow.bias


def literal(x: Tensor, m: MixerGatingUnit, mask: Tensor) -> Tensor:
    """One sequence (n, c), channel by channel and then token by token."""
    seen = torch.zeros(m.length, m.dim, dtype=torch.float64)
    seen[: len(x)] = layer_norm(x, m.token_norm) * mask[:, None]
    mixed = x + torch.stack([feed(seen[:, c], m.tokens)[: len(x)] for c in range(m.dim)], -1)
    mixed = torch.stack([t + feed(layer_norm(t, m.channel_norm), m.channels) for t in mixed])
    return torch.stack([m.proj.weight @ t + m.proj.bias for t in x]) * mixed


@pytest.mark.parametrize("n", [5, 3])
def test_equals_its_steps(n):
    m = build()
    x = torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, 1] = False
    expected = torch.stack([literal(row, m, seen) for row, seen in zip(x, mask, strict=True)])
    assert_same_with_gradients(m(x, mask=mask), expected, [x, *m.parameters()])


def test_a_projection_of_zero_closes_the_gate():
    torch.manual_seed(0)
    model = NiNformer(6, depth=1, length=5, hidden=7, dtype=torch.float64)
    block = model.blocks[0]
    with torch.no_grad():
        block.mixer.proj.weight.zero_()
        block.mixer.proj.bias.zero_()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert_close(model(x), x + block.mlp(block.norm(x)))


def test_a_block_has_one_norm_for_both_parts():
    torch.manual_seed(0)
    model = NiNformer(6, depth=2, length=5, hidden=7, dtype=torch.float64)
    scatter(model)
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    y, whole = x, torch.ones(5, dtype=torch.bool)
    for block in model.blocks:
        y = y + literal(layer_norm(y[0], block.norm), block.mixer, whole)
        y = y + torch.stack([feed(layer_norm(t, block.norm), block.mlp) for t in y[0]])
    assert_close(model(x), y)


def test_published_parameters():
    total = sum(p.numel() for p in NiNformer(device="meta").parameters())
    assert total == 2_637_056
    assert total + (3 * 16 + 1) * 256 + 257 * 10 == 2_652_170  # patches of 4 x 4, ten classes
    n, d, h = 9, 16, 24
    tokens, channels = n * h + h + h * n + n, d * h + h + h * d + d
    block = sum(p.numel() for p in NiNformer(d, depth=1, length=n, hidden=h).parameters())
    assert block == tokens + 2 * channels + d * d + d + 3 * 2 * d


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="x has 6 tokens, must have at most length, which is 5"):
        build()(torch.zeros(1, 6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="length is 0"):
        MixerGatingUnit(8, length=0)
    with pytest.raises(ValueError, match="depth is 0"):
        NiNformer(8, depth=0)
