"""Predicted connectivity: scores, picks and attention by loops, pruned tokens, where gradients flow."""

from __future__ import annotations

import math

import pytest
import torch

import heedful
from heedful.routing.connectivity import ConnectivityPredictor, keep_patches, reconstruction_loss

F64 = torch.float64


def build(tokens=13, **options):
    torch.manual_seed(0)
    predictor = ConnectivityPredictor(
        4, tokens, heads=3, reduce_tokens=2, coefficients=3, dtype=F64, **options
    )
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return predictor


def scores_by_hand(predictor, query, key, active, kept=True):
    """Steps 1 to 6 for one head (n, d); class token first."""
    q, k = (y @ layer.weight.T + layer.bias for y, layer in ((query, predictor.query), (key, predictor.key)))
    if active is not None:
        live = torch.cat([torch.ones(1, dtype=F64), active.double()])[:, None]
        q, k = q * live, k * live
    reduced = k.T @ predictor.reduce
    rows = []
    for i in range(1, len(query)):
        row = (q[i] @ reduced * 3**-0.5).softmax(0)
        if kept:
            large = sorted(range(len(row)), key=lambda r: -row[r].item())[:3]
            row = torch.stack([row[r] if r in large else row[r] * 0 for r in range(len(row))])
            basis = torch.where(
                predictor.expand.abs() > predictor.basis_threshold, predictor.expand.abs(), 0.0
            )
        else:
            basis = predictor.expand
        rows.append(basis @ row)
    return torch.stack(rows)


@pytest.mark.parametrize("pruned", [False, True])
def test_equals_loops(pruned):
    n = 13
    predictor = build(basis_threshold=0.3)
    query, key, value = (torch.randn(2, 3, n, 4, dtype=F64, requires_grad=True) for _ in range(3))
    active = None
    if pruned:
        active = torch.ones(2, n - 1, dtype=torch.bool)
        active[0, [1, 4, 5, 6]] = active[1, [0, 2, 3, 11]] = False
    scores, coefficients = predictor.scores(query, key, active=active)
    seen = predictor(query, key, active=active)
    mask = torch.zeros(2, 3, n, n, dtype=torch.bool)
    for b in range(2):
        for h in range(3):
            row_active = None if active is None else active[b]
            expected = scores_by_hand(predictor, query[b, h], key[b, h], row_active)
            # All coefficients of a pruned patch are equal, so which of them it keeps is open.
            live = range(n - 1) if row_active is None else row_active.nonzero()[:, 0].tolist()
            torch.testing.assert_close(scores[b, h, live], expected[live])
            mask[b, h] = seen.dense(2, 3)[b, h]
            assert (mask[b, h, 1:].sum(-1) == 4).all()
            mask[b, h, 0] = True
            mask[b, h, [j + 1 for j in live]] = False
            for i in (j + 1 for j in live):
                columns = [j for j in range(n) if j == 0 or row_active is None or row_active[j - 1]]
                best = sorted(columns, key=lambda j: -expected[i - 1, j].item())[:4]  # ceil(13 / 4)
                mask[b, h, i, best] = True
    assert torch.equal(seen.dense(2, 3), mask)
    assert ((coefficients > 0).sum(-1) == 3).all()
    assert torch.linalg.matrix_rank(scores.detach()).max() <= 6
    weights = (query @ key.mT / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = weights @ value
    loss = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * loss).sum(), (query, key, value))
    for backend in ("reference", "tiled"):
        y = heedful.attention(query, key, value, pattern=seen, backend=backend)
        torch.testing.assert_close(y, expected)
        # The choice passes no gradient, to the predictor or through it.
        grads = torch.autograd.grad((y * loss).sum(), (query, key, value))
        torch.testing.assert_close(grads, wanted)
        loose = torch.autograd.grad(
            heedful.attention(query, key, value, pattern=seen, backend=backend).sum(),
            list(predictor.parameters()),
            allow_unused=True,
        )
        assert all(g is None for g in loose)


def test_cost_is_that_of_the_budget():
    predictor = ConnectivityPredictor(8, 197, heads=4)
    groups = predictor(torch.randn(1, 4, 197, 8), torch.randn(1, 4, 197, 8))
    assert groups.key_index.shape == (1, 4, 196 + 4, 50)


def test_all_kept_is_dense_attention():
    predictor = build(keep_rate=1.0)
    query, key, value = (torch.randn(1, 3, 13, 4, dtype=F64) for _ in range(3))
    torch.testing.assert_close(
        heedful.attention(query, key, value, pattern=predictor(query, key)),
        heedful.attention(query, key, value),
    )


def test_reconstruction_trains_every_part():
    predictor = build()
    query, key = (torch.randn(1, 3, 13, 4, dtype=F64) for _ in range(2))
    estimate = predictor.reconstruction(query, key)
    expected = torch.stack([scores_by_hand(predictor, query[0, h], key[0, h], None, False) for h in range(3)])
    torch.testing.assert_close(estimate[0], expected)
    teacher = (query @ key.mT / 2).softmax(-1)
    loss = reconstruction_loss(estimate, teacher)
    torch.testing.assert_close(loss, ((expected - teacher[0, :, 1:]) ** 2).sum())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, list(predictor.parameters())))


def test_pruning():
    weights = torch.tensor([[[0.1, 0.5, 0.2, 0.2], [0.4, 0.1, 0.2, 0.4]]])  # means 0.25 0.3 0.2 0.3
    assert keep_patches(weights, 2).tolist() == [[False, True, False, True]]
    active = torch.tensor([[True, True, True, False]])
    assert keep_patches(weights, 2, active).tolist() == [[True, True, False, False]]


def test_parameter_count():
    predictor = ConnectivityPredictor(64, 197, heads=6)
    assert sum(p.numel() for p in predictor.parameters()) == 2 * (64 * 32 + 32) + 2 * 197 * 32
    assert predictor.budget(197) == math.ceil(0.25 * 197) == 50


def test_tables_follow_the_map():
    predictor = build(tokens=10)
    query, key = (torch.randn(1, 3, 10, 4, dtype=F64) for _ in range(2))
    same = predictor.scores(query, key)
    torch.testing.assert_close(predictor.scores(query, key, size=(3, 3)), same)
    query, key = (torch.randn(1, 3, 9, 4, dtype=F64) for _ in range(2))
    with torch.no_grad():  # one row for all places stays that row on any map
        for table in (predictor.reduce, predictor.expand):
            table[1:] = table[1:2].clone()
    scores, rows = predictor.scores(query, key, size=(2, 4))
    assert (scores.shape, rows.shape) == ((1, 3, 8, 9), (1, 3, 8, 5))
    torch.testing.assert_close(scores[..., 1:], scores[..., 1:2].expand(-1, -1, -1, 8))
    assert predictor(query, key, size=(2, 4)).key_index.shape == (1, 3, 8 + 3, 3)  # ceil(9 / 4)
    with pytest.raises(ValueError, match="must be None for 12 patches"):
        build()(query, key, size=(2, 4))


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="coefficients is 8, must be at most the rank, 2"):
        ConnectivityPredictor(8, 17, heads=2, reduce_tokens=8)
    with pytest.raises(ValueError, match="query has 5 tokens, must have 13"):
        build()(torch.zeros(1, 3, 5, 4, dtype=F64), torch.zeros(1, 3, 5, 4, dtype=F64))
