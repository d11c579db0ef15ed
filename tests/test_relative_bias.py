"""Swin-like tables and their factors; factors made by nets."""

from __future__ import annotations

import itertools

import pytest
import torch

import heedful
from heedful import authors
from heedful.mixers.heads.neural_bias import NeuralBias, imitation_loss, pair_tokens
from heedful.ops.bias import FactoredBias
from heedful.ops.relative_bias import compressed_bias, relative_bias, relative_index

F64 = torch.float64


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
def test_table_by_offsets(shape):
    rows = 1
    for side in shape:
        rows *= 2 * side - 1
    table = torch.randn(rows, 2, dtype=F64, requires_grad=True)
    bias = relative_bias(table, shape)
    cells = list(itertools.product(*map(range, shape)))
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            row = 0
            for q, k, side in zip(query, key, shape, strict=True):
                row = row * (2 * side - 1) + q - k + side - 1
            assert torch.equal(bias[:, i, j], table[row])
    bias.sum().backward()
    uses = torch.bincount(relative_index(shape).flatten(), minlength=rows)
    torch.testing.assert_close(table.grad, uses[:, None].expand(-1, 2).to(F64))


def smooth_table(side):
    """What trained tables look like: a smooth function of the offset."""
    place = torch.arange(1 - side, side, dtype=F64) / side
    y, x = place[:, None], place[None]
    heads = [-3 * (x**2 + y**2), (-4 * (x - 0.3) ** 2 - 2 * y**2).exp() * 2]
    return torch.stack([h.flatten() for h in heads], dim=1)


def test_smooth_tables_become_factors_and_rough_ones_stay():
    bias = relative_bias(smooth_table(6), (6, 6))
    factors = compressed_bias(bias)
    assert isinstance(factors, FactoredBias)
    assert factors.rank <= 8
    kept = factors.dense()[0]
    lost = (kept - bias).square().sum((-2, -1)) / bias.square().sum((-2, -1))
    assert (lost <= 0.005).all()
    assert (lost > 0).all()
    rough = torch.randn(2, 36, 36, dtype=F64)
    assert compressed_bias(rough) is rough
    assert isinstance(compressed_bias(rough, max_rank=36), FactoredBias)


def test_cosine_attention_with_either_form_of_the_bias():
    """As in Swin V2: queries and keys of length 1, times a learned scale a head, scale 1."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 36, 8, dtype=F64)
    q = torch.nn.functional.normalize(q, dim=-1) * torch.tensor([10.0, 14.0], dtype=F64)[:, None, None]
    k = torch.nn.functional.normalize(k, dim=-1)
    bias = relative_bias(smooth_table(6), (6, 6))
    exact = compressed_bias(bias, energy=1.0, max_rank=36)
    dense = heedful.attention(q, k, v, bias=bias[None], scale=1.0)
    torch.testing.assert_close(heedful.attention(q, k, v, bias=exact, scale=1.0), dense)
    near = heedful.attention(q, k, v, bias=compressed_bias(bias), scale=1.0)
    assert 0 < (near - dense).norm() / dense.norm() < 0.1


def test_nets_by_loops():
    torch.manual_seed(0)
    nets = NeuralBias(5, heads=2, rank=3, hidden=4, dtype=F64)
    x = torch.randn(2, 4, 5, dtype=F64, requires_grad=True)
    z = torch.randn(2, 6, 5, dtype=F64, requires_grad=True)

    def phi(net, token):
        hidden = torch.tanh(net[2].weight @ torch.tanh(net[0].weight @ token))
        return (net[4].weight @ hidden).view(2, 3)

    expected = torch.stack(
        [
            torch.stack(
                [
                    torch.stack([(phi(nets.query, a) * phi(nets.key, b)).sum(-1) for b in z[s]], -1)
                    for a in x[s]
                ],
                1,
            )
            for s in range(2)
        ]
    )
    bias = nets(x, z).dense()
    torch.testing.assert_close(bias, expected)
    leaves = [x, z, *nets.parameters()]
    grads = torch.autograd.grad(bias.sin().sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad(expected.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_pair_tokens_and_loss():
    pair, left, right = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2), torch.randn(2, 4, 2)
    queries, keys = pair_tokens(pair, left, right)
    for i in range(3):
        torch.testing.assert_close(
            queries[:, i], torch.cat([sum(pair[:, i, j] for j in range(4)) / 4, left[:, i]], -1)
        )
    for j in range(4):
        torch.testing.assert_close(
            keys[:, j], torch.cat([sum(pair[:, i, j] for i in range(3)) / 3, right[:, j]], -1)
        )
    bias = FactoredBias(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 4, 2))
    assert imitation_loss(bias, torch.full((2, 3, 3, 4), 5.0)) == 9.0


def test_imitation_of_a_pair_bias():
    """A bias that is no product of tokens, and of no low rank, is imitated well enough to attend with."""
    torch.manual_seed(0)
    place = torch.rand(12, 2)
    wanted = -2 * torch.cdist(place, place)[None, None]
    tokens = torch.cat([place, torch.ones(12, 1)], dim=1)[None]  # the nets have no biases
    nets = NeuralBias(3, heads=1, rank=6, hidden=32)
    optimizer = torch.optim.Adam(nets.parameters(), lr=0.01)
    losses = []
    for _ in range(400):
        loss = imitation_loss(nets(tokens, tokens), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * float(wanted.var())
    q, k, v = torch.randn(3, 1, 1, 12, 8)
    out = heedful.attention(q, k, v, bias=nets(tokens, tokens))
    dense = heedful.attention(q, k, v, bias=wanted)
    assert (out - dense).norm() / dense.norm() < 0.1


def test_released_names_and_sizes():
    nets = NeuralBias(128 + 449, device="meta")
    per_net = 577 * 256 + 256 * 256 + 256 * 4 * 96
    assert sum(q.numel() for q in nets.parameters()) == 2 * per_net
    small = NeuralBias(5, heads=2, rank=3, hidden=4)
    theirs = {
        f"linear_{name[0]}_flashbias.{rest}": torch.randn_like(a)
        for name, a in small.state_dict().items()
        for rest in [name.split(".", 1)[1]]
    }
    loaded = authors.load(small, theirs)
    assert torch.equal(loaded.key[2].weight, theirs["linear_k_flashbias.2.weight"])


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match=r"table has 8 rows, must have 9 for a window \(2, 2\)"):
        relative_bias(torch.zeros(8, 2), (2, 2))
    with pytest.raises(ValueError, match="max_rank is 0"):
        compressed_bias(torch.zeros(1, 2, 2), max_rank=0)
    with pytest.raises(ValueError, match="rank is 0"):
        NeuralBias(4, rank=0)
    with pytest.raises(ValueError, match="key_tokens has shape"):
        NeuralBias(4)(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3))
