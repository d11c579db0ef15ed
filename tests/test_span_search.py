"""Profiling of attention weights and the search for spans: exact on what can be counted by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from heedful.inspect import (
    SpanPlan,
    attention_influence,
    block_influence,
    profile_influence,
    search_spans,
    span_candidates,
)
from heedful.patterns import Causal, ElasticSpan


def causal_weights(*shape: int) -> torch.Tensor:
    logits = torch.randn(*shape, dtype=torch.float64)
    return logits.masked_fill(torch.ones(shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


# -- profiling -----------------------------------------------------------------------------------------


def test_influence_is_exact_for_a_linear_loss():
    weights, slope = causal_weights(2, 7, 7), torch.randn(2, 7, 7, dtype=torch.float64)
    found = attention_influence(weights, slope)
    for h, i in itertools.product(range(2), range(1, 7)):
        for j in range(i + 1):
            row = weights[h, i].clone()
            row[j] = 0
            change = (row / row.sum() * slope[h, i]).sum() - (weights[h, i] * slope[h, i]).sum()
            torch.testing.assert_close(found[h, i, j], change)
    torch.testing.assert_close(found[:, 0, 0], -slope[:, 0, 0])
    assert (found[..., 0, 1:] == 0).all()
    one_hot = torch.eye(5, dtype=torch.float64)
    assert attention_influence(one_hot, torch.randn(5, 5, dtype=torch.float64)).isfinite().all()


def test_sums_over_blocks():
    influence = torch.randn(3, 10, 10, dtype=torch.float64)
    found = block_influence(influence, 4)
    assert found.shape == (3, 3, 3)
    for i, j in itertools.product(range(3), repeat=2):
        pairs = [
            (a, b)
            for a in range(4 * i, min(4 * i + 4, 10))
            for b in range(4 * j, min(4 * j + 4, 10))
            if b <= a
        ]
        expected = sum((influence[:, a, b] for a, b in pairs), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(found[:, i, j], expected)


class TwoLayers(torch.nn.Module):
    """Two attention layers whose weights may be changed from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 18) for _ in range(2))

    def forward(self, x, change=None):
        kept = []
        for number, layer in enumerate(self.layers):
            q, k, v = layer(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            weights = (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)
            if change is not None:
                weights = change(number, weights)
            kept.append(weights)
            x = x + (weights @ v).transpose(1, 2).flatten(2)
        return x, kept


def test_profile_of_a_model():
    """Against central differences of the loss along the change that removes a block of weights."""
    torch.manual_seed(0)
    model = TwoLayers().double()
    batches = [torch.randn(2, 6, 6, dtype=torch.float64) for _ in range(2)]

    def loss(y):
        return y.square().mean((1, 2)).mean()

    def run(batch):
        y, weights = model(batch)
        return loss(y), weights

    found = profile_influence(run, batches, block_size=2)
    assert found.shape == (2, 2, 3, 3)
    for layer, head, i, j in [(0, 0, 1, 0), (0, 1, 2, 2), (1, 0, 2, 1), (1, 1, 1, 1)]:
        total = 0.0
        for batch in batches:
            for a, b in itertools.product(range(2 * i, 2 * i + 2), range(2 * j, 2 * j + 2)):
                if b > a:
                    continue

                def change(number, weights, share, layer=layer, head=head, a=a, b=b):
                    if number != layer:
                        return weights
                    without = weights[:, head, a].clone()
                    without[:, b] = 0
                    without = without / without.sum(-1, keepdim=True)
                    moved = weights.clone()
                    moved[:, head, a] = weights[:, head, a] + share * (without - weights[:, head, a])
                    return moved

                with torch.no_grad():
                    up, down = (
                        loss(model(batch, lambda n, w, s=s: change(n, w, s))[0]) for s in (1e-4, -1e-4)
                    )
                total += float(up - down) / 2e-4
        assert float(found[layer, head, i, j]) == pytest.approx(total / 2, rel=1e-4, abs=1e-7)


def test_profile_and_search_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)

    def run(ids):
        out = model(ids, labels=ids, output_attentions=True)
        return out.loss, out.attentions

    found = {
        n: profile_influence(run, [torch.randint(30, (1, n)) for _ in range(2)], block_size=4)
        for n in (16, 32)
    }
    assert found[32].shape == (2, 4, 8, 8)
    assert float(found[32].abs().max()) > 0
    plans = search_spans(found, group=2, sink=4, block_size=4, candidates=span_candidates((16, 32), step=8))
    for plan in plans:
        assert len(plan.alphas) == 2 and len(plan.alphas[0]) == 2
        assert all(0.45 - 1e-9 <= plan.density(n) <= 0.5 + 1e-9 for n in (16, 32))
    assert plans[0].patterns(length=32, group=2)[1].heads == 4


# -- search --------------------------------------------------------------------------------------------


def test_candidates():
    found = span_candidates((2048, 4096, 8192), max_length=16384)
    alphas = sorted({a for a, _ in found})
    assert alphas[0] == -1024 and 8192 in alphas
    assert {b for _, b in found} == {i / 8 for i in range(9)}
    for a, b in found:
        assert a + b * 8192 <= 8192 and a + b * 16384 <= 16384 and a + b * 2048 > 0
    assert (0.0, 1.0) in found and (-1024.0, 0.875) in found and (0.0, 0.0) not in found


RULES = [(4.0, 0.0), (0.0, 0.5), (8.0, 0.0), (0.0, 1.0), (-4.0, 0.75)]


def hidden(influence: torch.Tensor, n: int, rule: tuple[float, float]) -> torch.Tensor:
    """(layers, heads): what a rule hides, block by block."""
    total = torch.zeros(influence.shape[:2], dtype=torch.float64)
    band = max(1, int(rule[0] // 4 + rule[1] * (n // 4)))
    for i in range(n // 4):
        for j in range(1, i + 1):  # block 0 is the sink
            if i - j >= band:
                total += influence[:, :, i, j].abs()
    return total


def every_plan(influence: dict[int, torch.Tensor], density: float, floor: float, kinds: int):
    """(losses, rules) of all plans that fit, by trying each."""
    layers, heads = next(iter(influence.values())).shape[:2]
    costs = {n: torch.stack([hidden(x, n, rule) for rule in RULES], -1) for n, x in influence.items()}
    share = {
        n: [min(n // 4, max(1, int(a // 4 + b * (n // 4))) + 1) / (n // 4) for a, b in RULES]
        for n in influence
    }
    for choice in itertools.product(range(len(RULES)), repeat=layers * heads):
        by_layer = [choice[x * heads : (x + 1) * heads] for x in range(layers)]
        if any(len(set(x)) > kinds for x in by_layer):
            continue
        means = [sum(share[n][c] for c in choice) / len(choice) for n in influence]
        if all(floor * density - 1e-9 <= m <= density + 1e-9 for m in means):
            yield tuple(
                sum(float(costs[n][x, h, c]) for x, row in enumerate(by_layer) for h, c in enumerate(row))
                for n in influence
            )


def planted(seed: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    influence = torch.randn(2, 3, n // 4, n // 4, generator=generator, dtype=torch.float64)
    influence[0, 0] *= 5  # a head that matters
    return influence.tril()


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_length_gives_the_best_plan(seed, kinds):
    influence = {32: planted(seed, 32)}
    best = min(every_plan(influence, 0.6, 0.9, kinds))
    (plan,) = search_spans(
        influence, density=0.6, kinds=kinds, candidates=RULES, sink=4, block_size=4, solver="milp"
    )
    assert plan.losses == pytest.approx(best)
    assert all(
        len(set(zip(a, b, strict=True))) <= kinds for a, b in zip(plan.alphas, plan.betas, strict=True)
    )
    total = sum(
        float(hidden(influence[32], 32, rule)[x, h])
        for x, row in enumerate(zip(plan.alphas, plan.betas, strict=True))
        for h, rule in enumerate(zip(*row, strict=True))
    )
    assert plan.losses == pytest.approx((total,))


def test_two_lengths_give_plans_that_nothing_beats():
    influence = {16: planted(3, 16), 32: planted(4, 32)}
    plans = search_spans(
        influence, density=0.7, floor=0.8, candidates=RULES, sink=4, block_size=4, solver="milp"
    )
    every = list(every_plan(influence, 0.7, 0.8, 2))
    ends = [min(x[k] for x in every) for k in range(2)]
    for plan in plans:
        assert not any(x[0] < plan.losses[0] - 1e-9 and x[1] < plan.losses[1] - 1e-9 for x in every)
    assert plans[0].losses[0] == pytest.approx(ends[0])
    assert min(plan.losses[1] for plan in plans) == pytest.approx(ends[1])
    assert [plan.losses for plan in plans] == sorted(plan.losses for plan in plans)
    for n in (16, 32):
        assert all(0.56 - 1e-9 <= plan.density(n) <= 0.7 + 1e-9 for plan in plans)


def test_greedy_fits_the_budget_and_comes_near():
    for seed in range(3):
        influence = {32: planted(seed, 32)}
        plans = search_spans(influence, density=0.6, candidates=RULES, sink=4, block_size=4, solver="greedy")
        best = min(every_plan(influence, 0.6, 0.0, 2))[0]
        worst = max(every_plan(influence, 0.6, 0.0, 2))[0]
        assert plans[0].density(32) <= 0.6 + 1e-9
        assert best - 1e-9 <= plans[0].losses[0] <= best + 0.15 * (worst - best)


def test_groups_take_the_largest_influence():
    influence = planted(0, 32)
    doubled = torch.stack([influence, 0.5 * influence], 2).flatten(1, 2)
    one, two = (
        search_spans({32: x}, density=0.6, group=g, candidates=RULES, sink=4, block_size=4)
        for x, g in ((influence, 1), (doubled, 2))
    )
    assert one == two


def test_a_longer_length_bounds_the_density_too():
    influence = {16: planted(0, 16)}
    (free,) = search_spans(influence, density=1.0, floor=0.0, candidates=RULES, sink=4, block_size=4)
    assert free.density(16) == free.density(64) == 1.0
    (bound,) = search_spans(
        influence, density=0.5, floor=0.0, max_length=64, candidates=RULES, sink=4, block_size=4
    )
    assert bound.density(64) <= 0.5 + 1e-9


def test_plans():
    told = {"alphas": [[0, 64], [128, -64]], "betas": [[1, 0.5], [0, 0.75]]}
    plan = SpanPlan.from_dict(told, sink=0)
    assert plan.as_dict() == told
    assert plan.patterns(length=256)[1] == ElasticSpan((128, -64), (0.0, 0.75), 0, 64, 256)
    seen = ElasticSpan((0, 64), (1.0, 0.5), 0, 64, 256).mask(256)
    assert torch.equal(seen[:, :1], Causal().mask(256))
    assert plan.density(256) == (1.0 + 0.75 + 0.5 + 0.5) / 4


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="influence is empty"):
        search_spans({})
    with pytest.raises(ValueError, match=r"influence\[32\] has shape"):
        search_spans({32: torch.zeros(1, 1, 4, 4)}, candidates=RULES, block_size=4, sink=4)
    with pytest.raises(ValueError, match=r"density is 0\.01"):
        search_spans({32: planted(0, 32)}, density=0.01, candidates=RULES, block_size=4, sink=4)
    with pytest.raises(ValueError, match="solver is 'best'"):
        search_spans({32: planted(0, 32)}, solver="best")
    with pytest.raises(ValueError, match="batches is empty"):
        profile_influence(lambda batch: batch, [])
