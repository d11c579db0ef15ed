from __future__ import annotations

import pytest
import torch
from tests.literal import assert_same_with_gradients, scatter
from torch import Tensor
from torch.testing import assert_close

from heedful.inspect.associative_capacity import (
    associative_capacity,
    effective_rank,
    mean_cosine,
    propagated_error,
    signal_to_interference,
)
from heedful.mixers.linear.pavlovian import RULES, HebbianAttention


def build(**arguments) -> HebbianAttention:
    torch.manual_seed(0)
    mixer = HebbianAttention(6, **{"heads": 2, "causal": True, **arguments}, dtype=torch.float64)
    scatter(mixer)
    return mixer


def written(k: Tensor, v: Tensor, S: Tensor, m: HebbianAttention) -> Tensor:
    change = torch.outer(v, k)
    if m.rule == "delta":
        change = torch.outer(v - S @ k, k)
    if m.rule == "oja":
        change = change - (k @ k) * S
    return m.keep * S + m.rate * change


def literal(x: Tensor, m: HebbianAttention, mask: Tensor) -> Tensor:
    """One sequence (n, c), head by head and token by token."""
    heads = []
    for h in range(2):
        own = slice(3 * h, 3 * h + 3)
        q, k, v = (x @ p.weight[own].T for p in (m.query, m.key, m.value))
        if m.unit_keys:
            q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        S, states = torch.zeros(3, 3, dtype=torch.float64), []
        for t in range(len(x)):
            S = written(k[t], v[t], S, m) if mask[t] else S
            states.append(S)
        heads.append(torch.stack([(states[t] if m.causal else S) @ q[t] for t in range(len(x))]))
    return torch.cat(heads, -1) @ m.out.weight.T


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", [{}, {"keep": 0.8, "rate": 0.6}, {"unit_keys": False, "rate": 0.05}])
def test_equals_the_rules_token_by_token(rule, causal, how):
    m = build(rule=rule, causal=causal, **how)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2] = mask[1, 5:] = False
    expected = torch.stack([literal(row, m, seen) for row, seen in zip(x, mask, strict=True)])
    assert_same_with_gradients(m(x, mask=mask), expected, [x, *m.parameters()])


def pairs(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 1, n, d, dtype=torch.float64, generator=generator) for _ in range(2))
    return torch.nn.functional.normalize(keys, dim=-1), values


def test_delta_recalls_the_last_pair_and_hebb_orthogonal_ones():
    k, v = pairs(12, 3)
    o, _ = build(rule="delta", rate=1.0).associate(k, k, v)
    assert_close(o, v)  # each pair right after it was written
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0][None, None]
    for rule in ("hebb", "delta"):
        o, _ = build(rule=rule, rate=1.0, causal=False).associate(basis, basis, pairs(5, 5)[1])
        assert_close(o, pairs(5, 5)[1])


def test_oja_at_full_rate_holds_the_last_pair_alone():
    k, v = pairs(4, 3)
    _, matrix = build(rule="oja", rate=1.0).associate(k, k, v)
    assert_close(matrix[0, 0], torch.outer(k[0, 0, -1], v[0, 0, -1]))


def test_decoding():
    for rule in RULES:
        m, x = build(rule=rule, keep=0.9), torch.randn(2, 9, 6, dtype=torch.float64)
        state, parts = m.init_state(2), []
        for piece in x.split([1, 5, 1, 2], dim=1):
            y, state = m(piece, state=state)
            parts.append(y)
        assert_close(torch.cat(parts, 1), m(x))


def test_signal_to_interference_pair_by_pair():
    keys, values = (torch.randn(2, 6, 4, dtype=torch.float64) for _ in range(2))
    found = signal_to_interference(keys, values)
    for h in range(2):
        for j in range(6):
            other = sum((keys[h, i] @ keys[h, j]) * values[h, i] for i in range(6) if i != j)
            assert_close(found[h, j], keys[h, j] @ keys[h, j] * values[h, j].norm() / other.norm())


def test_random_unit_keys_follow_the_square_root():
    keys, values = pairs(400, 64)
    found = associative_capacity(keys, values)
    # Components of the interference have variance (n - 1) / d, so the SIR is about sqrt(d / (n - 1)).
    assert abs(found.sir.median().item() / (64 / 399) ** 0.5 - 1) < 0.2
    assert abs(found.capacity.item() / 65 - 1) < 0.2
    assert (found.average_bound, found.safe_bound) == (64.0, 8.0)
    assert 50 < found.effective_rank.item() <= 64
    assert abs(found.mean_cosine.item() / (2 / (torch.pi * 64)) ** 0.5 - 1) < 0.05
    assert "head 0: SIR" in str(found) and "softmax" in str(found)


def test_orthogonal_keys_are_not_disturbed():
    keys = torch.eye(4, dtype=torch.float64)
    found = associative_capacity(keys, torch.randn(4, 3, dtype=torch.float64))
    assert found.sir.isinf().all() and found.capacity.isinf()
    assert_close(found.effective_rank.item(), 4.0)
    assert found.mean_cosine == 0


def test_measures_of_keys():
    keys = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], dtype=torch.float64)
    assert_close(mean_cosine(keys).item(), 3 / 6)  # three of six pairs lie on one line
    assert_close(mean_cosine(keys[:1]).item(), 0.0)
    assert_close(effective_rank(keys[:2]).item(), 1.0)


def test_errors_add_up_over_layers_and_average_over_heads():
    assert_close(propagated_error(0.1, 2), 0.19)
    assert_close(propagated_error(0.1, 3, heads=4), 1 - 0.95**3)
    assert propagated_error(0.0, 5) == 0.0 and propagated_error(1.0, 1) == 1.0


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="rule is 'bcm', must be one of"):
        HebbianAttention(8, rule="bcm")
    with pytest.raises(ValueError, match=r"keep is 0\.0, must be over 0"):
        HebbianAttention(8, keep=0.0)
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        HebbianAttention(8, rate=1.5)
    with pytest.raises(ValueError, match="keys has 1 keys, must have at least 2"):
        associative_capacity(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"values \(3, 3\)"):
        associative_capacity(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="error is 2"):
        propagated_error(2.0, 1)
