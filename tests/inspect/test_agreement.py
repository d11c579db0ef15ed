"""Measures of agreement against scipy, loops and known answers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from heedful import inspect as look
from heedful.inspect import Attribution


def lists():
    """Pairs of lists, without ties, with some and with many."""
    torch.manual_seed(0)
    for levels in (1000, 6, 2):
        for n in (2, 7, 30):
            yield tuple(torch.randint(levels, (2, n)).double() - 1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("kendall_tau", stats.kendalltau),
        ("weighted_kendall_tau", stats.weightedtau),
        ("spearman", stats.spearmanr),
        ("pearson", stats.pearsonr),
    ],
)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_correlations_are_scipys(ours, theirs):
    told = 0
    for a, b in lists():
        wanted = float(theirs(a.numpy(), b.numpy())[0])
        found = getattr(look, ours)(a, b)
        if math.isnan(wanted):
            assert found == 0.0
        else:
            assert found == pytest.approx(wanted, abs=1e-12)
            told += 1
    assert told >= 6
    constant = torch.full((5,), 0.1)
    assert getattr(look, ours)(constant, torch.arange(5.0)) == 0.0


def top_k_by_loops(a, b, k, p):
    def places(x):
        return [sum(y > own for y in x) + (sum(y == own for y in x) + 1) / 2 for own in x]

    def top(x):
        levels = sorted(set(x), reverse=True)[:k]
        return [i for i, own in enumerate(x) if own in levels]

    x, y = places(a), places(b)
    pairs = {frozenset((i, j)) for i in top(a) for j in top(b) if i != j}
    penalty = 0.0
    for pair in pairs:
        i, j = sorted(pair)
        first, second = x[i] - x[j], y[i] - y[j]
        if first * second < 0:
            penalty += 1
        elif (first == 0) != (second == 0):
            penalty += p
    return 1 - 2 * penalty / max(1, len(pairs))


def test_kendall_top_k():
    for a, b in lists():
        for k in (1, 2, 5):
            for p in (0.5, 0.2):
                wanted = top_k_by_loops(a.tolist(), b.tolist(), k, p)
                assert look.kendall_top_k(a, b, k, p=p) == (pytest.approx(wanted), k)
    strict = torch.tensor([0.3, 2.0, 1.0, -1.0, 0.0])
    assert look.kendall_top_k(strict, strict) == (1.0, 5)
    assert look.kendall_top_k(strict, -strict) == (-1.0, 5)
    assert look.kendall_top_k(torch.zeros(5), strict) == (0.0, 5)
    assert look.kendall_top_k(strict, torch.tensor([0.0, 1, 0, 0, 1]), "nonzero")[1] == 2
    assert look.kendall_top_k(strict, strict, 0.5)[1] == 2 and look.kendall_top_k(strict, strict, 0.1)[1] == 1
    assert look.kendall_top_k(torch.zeros(5), strict, "nonzero") == (1.0, 0)


def test_explanation_agreement_is_the_mean_over_instances():
    torch.manual_seed(0)
    instances, masks = [], []
    for n in (5, 8):
        names = [f"t{i}" for i in range(n)]
        instances.append([Attribution(m, names, torch.randn(n)) for m in "abc"])
        masks.append(torch.arange(n) > 0)
    for parts in (None, masks):
        found = look.explanation_agreement(instances, measure=look.spearman, parts=parts)
        assert found.methods == ["a", "b", "c"]
        cut = slice(None) if parts is None else slice(1, None)
        for i in range(3):
            for j in range(3):
                each = [
                    stats.spearmanr(x[i].scores.abs()[cut].numpy(), x[j].scores.abs()[cut].numpy())[0]
                    for x in instances
                ]
                assert found.table[i, j].item() == pytest.approx(sum(each) / 2)
        off = [found.table[i, j].item() for i in range(3) for j in range(3) if i != j]
        assert found.mean == pytest.approx(sum(off) / 6)


def test_attention_as_an_explanation():
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).softmax(-1)  # b, layers, heads
    average = look.attention_average(weights)
    for b in range(2):
        for i in range(5):
            most = max(
                sum(weights[b, x, h, i, j].item() for x in range(3) for h in range(4)) for j in range(5)
            )
            assert average[b, i].item() == pytest.approx(most / 12)
    value, out = torch.randn(2, 4, 5, 3, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    found = look.norm_based_attention(weights[:, 0], value, out)
    for h in range(4):
        alone = torch.zeros(12, dtype=torch.float64)
        alone[3 * h : 3 * h + 3] = value[1, h, 2]
        size = (weights[1, 0, h, 4, 2] * (out @ alone)).norm().item()
        assert found[1, h, 4, 2].item() == pytest.approx(size)
    # Of one layer, what flows is that layer's row with its residual stream.
    row = look.with_residual(weights[0, 0].mean(0))[0]
    flow = look.attention_flow([weights[0, 0]], 0)
    torch.testing.assert_close(flow / flow.sum(), row.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.door
def test_errors_at_the_door():
    one, two = Attribution("a", ["x"], torch.zeros(1)), Attribution("b", ["x"], torch.zeros(1))
    for measure in (look.kendall_tau, look.pearson, look.kendall_top_k):
        with pytest.raises(ValueError, match="must be one shape"):
            measure(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="k is 0, must be"):
        look.kendall_top_k(torch.zeros(2), torch.zeros(2), 0)
    with pytest.raises(ValueError, match="instance 1 has b, must have a"):
        look.explanation_agreement([[one], [two]])
    with pytest.raises(ValueError, match="must be at least one"):
        look.explanation_agreement([])
    with pytest.raises(ValueError, match="out has 5 inputs, must have 6"):
        look.norm_based_attention(torch.zeros(2, 4, 4), torch.zeros(2, 4, 3), torch.zeros(2, 5))
