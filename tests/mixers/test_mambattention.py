from __future__ import annotations

import pytest
import torch
from tests.literal import assert_same_with_gradients, layer_norm, scatter
from torch import Tensor
from torch.testing import assert_close

from heedful.mixers.scan.mambattention import BidirectionalMamba, MambAttention
from heedful.models.mambattention import DenseBlock, MambAttentionModel


def build(**arguments) -> MambAttention:
    torch.manual_seed(0)
    mixer = MambAttention(
        6, **{"heads": 2, "state_dim": 2, "conv_size": 3, "expand": 1, **arguments}, dtype=torch.float64
    )
    scatter(mixer)
    return mixer


def attended(x: Tensor, m: MambAttention) -> Tensor:
    """One row (n, c), head by head."""
    a, seen = m.attention, layer_norm(x, m.norm)
    q, k, v = (seen @ p.weight.T + p.bias for p in (a.query, a.key, a.value))
    heads = []
    for h in range(2):
        own = slice(3 * h, 3 * h + 3)
        weights = (q[:, own] @ k[:, own].T / 3**0.5).exp()
        heads.append(weights @ v[:, own] / weights.sum(1, keepdim=True))
    return torch.cat(heads, -1) @ a.out.weight.T + a.out.bias


def both_ways(x: Tensor, b: BidirectionalMamba) -> Tensor:
    """One row (n, c): two Mambas, each on normalised tokens, the second from the last token to the first."""

    def normed(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    ahead = x + b.ahead(normed(x, b.ahead_norm)[None])[0]
    order = list(range(len(x)))[::-1]
    turned = x[order]
    back = (turned + b.back(normed(turned, b.back_norm)[None])[0])[order]
    return ahead @ b.join.weight[:, :6].T + back @ b.join.weight[:, 6:].T + b.join.bias


def literal(x: Tensor, m: MambAttention) -> Tensor:
    """One map (c, time, frequency)."""

    def row(x, mamba):
        x = x + attended(x, m)
        return x + both_ways(x, mamba)

    x = torch.stack([row(x[:, :, f].T, m.time).T for f in range(x.shape[2])], dim=2)
    return torch.stack([row(x[:, t].T, m.frequency).T for t in range(x.shape[1])], dim=1)


def test_equals_its_steps_row_by_row():
    m = build()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x), torch.stack([literal(row, m) for row in x]), [x, *m.parameters()])


def test_one_attention_serves_both_axes():
    m = build()
    assert sum(name.startswith("attention.") for name, _ in m.named_parameters()) == 8  # one for both axes
    x = torch.randn(1, 6, 4, 1, dtype=torch.float64)
    rows = x[0, :, :, 0].T
    once = rows + attended(rows, m)
    once = once + both_ways(once, m.time)
    alone = [token[None] + attended(token[None], m) for token in once]
    expected = torch.cat([token + both_ways(token, m.frequency) for token in alone])
    assert_close(m(x)[0, :, :, 0].T, expected)


def test_dense_block_puts_the_newest_first():
    torch.manual_seed(0)
    block, x = DenseBlock(3), torch.randn(1, 3, 9, 5)
    first = block.layers[0](x)
    second = block.layers[1](torch.cat([first, x], 1))
    third = block.layers[2](torch.cat([second, first, x], 1))
    assert_close(block(x), block.layers[3](torch.cat([third, second, first, x], 1)))


def test_model():
    torch.manual_seed(0)
    model = MambAttentionModel(8, depth=1, bins=13, state_dim=4, expand=2)
    mag, phase = torch.rand(2, 13, 7), torch.randn(2, 13, 7)
    clean, turned, both = model(mag, phase)
    assert clean.shape == turned.shape == (2, 13, 7) and both.shape == (2, 13, 7, 2)
    assert ((clean >= 0) & (clean <= 2 * mag)).all() and (turned.abs() <= torch.pi).all()
    assert_close(torch.complex(both[..., 0], both[..., 1]).abs(), clean)
    both.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_published_parameters():
    with torch.device("meta"):
        model = MambAttentionModel()
    assert sum(p.numel() for p in model.parameters()) == 2_325_841


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="bins is 12, must be odd"):
        MambAttentionModel(8, bins=12)
    model = MambAttentionModel(8, depth=1, bins=13, state_dim=2, expand=1)
    with pytest.raises(ValueError, match=r"phase has shape \(1, 12, 5\), must be \(batch, 13, frames\)"):
        model(torch.zeros(1, 13, 5), torch.zeros(1, 12, 5))
