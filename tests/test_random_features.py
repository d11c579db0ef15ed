"""Random-feature attention: the layer by loops, its kernel, the fit, the experiment."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from heedful.bench import random_features as rf
from heedful.cli import app

F64 = torch.float64


def drawn(samples=3, keys=4, dim=3):
    torch.manual_seed(0)
    return torch.randn(samples, dim, dtype=F64), torch.randn(samples, keys, dim, dtype=F64)


@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_features_by_loops(shift):
    query, keys = drawn()
    layer = rf.RandomFeatureAttention(3, heads=5, shift=shift, seed=1)
    noise = rf.RandomFeatureAttention(3, heads=5, seed=1).weight
    found = layer(query, keys)
    v = torch.randn(5, 4, dtype=F64)
    for s in range(3):
        total = 0.0
        for m in range(5):
            w = noise[m].clone()
            for c in range(3):
                w[c, c] += shift
            for key in keys[s]:
                score = torch.cat([query[s], torch.ones(1)]) @ w @ torch.cat([key, torch.ones(1)])
                total += max(float(score), 0.0) * float(v[m] @ torch.cat([key, torch.ones(1)])) / 4
        assert float(found[s] @ v.flatten()) == pytest.approx(total, rel=1e-12)


def test_order_of_the_keys_does_not_matter_to_attention_alone():
    query, keys = drawn()
    order = torch.tensor([2, 0, 3, 1])
    layer = rf.RandomFeatureAttention(3, heads=5)
    torch.testing.assert_close(layer(query, keys[:, order]), layer(query, keys))
    net = rf.RandomFeatureMLP(3, keys=4, features=20)
    assert (net(query, keys[:, order]) - net(query, keys)).abs().max() > 0.1
    for target in rf.TARGETS.values():
        torch.testing.assert_close(target(query, keys[:, order]), target(query, keys))


def test_many_heads_have_the_arc_cosine_kernel():
    query, keys = drawn(2, 1)
    layer = rf.RandomFeatureAttention(3, heads=200000)
    a, b = (
        torch.outer(q, k).flatten() for q, k in zip(rf.with_one(query), rf.with_one(keys[:, 0]), strict=True)
    )
    scores = layer.weight.flatten(1) @ torch.stack([a, b], 1)
    kernel = (scores[:, 0].relu() * scores[:, 1].relu()).mean()
    angle = math.acos(float(a @ b / (a.norm() * b.norm())))
    # E relu(a.w) relu(b.w) with w ~ N(0, I / 4)
    wanted = (
        float(a.norm() * b.norm())
        / (2 * math.pi)
        * (math.sin(angle) + (math.pi - angle) * math.cos(angle))
        / 4
    )
    assert float(kernel) == pytest.approx(wanted, rel=0.03)  # 200000 draws scatter by 0.5 %
    features = layer(query, keys).unflatten(1, (-1, 4))
    inner = (features[0] * features[1]).sum() / 200000
    values = float(rf.with_one(keys[0, 0]) @ rf.with_one(keys[1, 0]))
    assert float(inner) == pytest.approx(wanted * values, rel=0.03)


@pytest.mark.parametrize("samples", [6, 30])
def test_fit_is_ridge(samples):
    torch.manual_seed(0)
    features, y = torch.randn(samples, 12, dtype=F64), torch.randn(samples, 2, dtype=F64)
    size = features.square().sum(1).mean()
    for ridge, v in zip((1e-3, 0.5), rf.fit(features, y, (1e-3, 0.5)), strict=True):
        slope = features.T @ (features @ v - y) + ridge * size * v
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-10)


def test_targets():
    query, keys = drawn()
    for s in range(3):
        products = [float(query[s] @ k) for k in keys[s]]
        first = [float(k[0]) for k in keys[s]]
        wanted = [
            sum(f * f for f in first) / 4,
            sum(p * p for p in products) / 4,
            sum(p * f for p, f in zip(products, first, strict=True)) / 4,
        ]
        for target, value in zip(rf.TARGETS.values(), wanted, strict=True):
            assert float(target(query, keys)[s]) == pytest.approx(value, rel=1e-12)


def test_small_experiment_shows_the_patterns():
    """Attention learns an average of keys; the two-layer net loses with their number."""
    report = rf.experiment(dim=6, heads=40, keys=(2, 12), samples=(300,))
    by = {(p.target, p.keys): p for p in report.points}
    few, many = by["(b.xi)^2", 2], by["(b.xi)^2", 12]
    assert many.attention < 0.5 * many.mlp
    assert many.mlp > 1.5 * few.mlp
    product = by["(x0.xi)^2", 12]
    assert product.biased < 0.8 * product.attention
    assert all(f.holds for f in report.findings if "two-layer" in f.pattern or "(x0.xi)^2" in f.pattern)


def test_command(tmp_path):
    file = tmp_path / "rf.json"
    words = ["bench", "rf", "--heads", "5", "--keys", "1,3", "--samples", "50", "--seed", "2"]
    done = CliRunner().invoke(app, [*words, "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "two-layer net" in done.output
    figures = json.loads(file.read_text())
    assert [(p["keys"], p["samples"]) for p in figures["points"]] == [(1, 50)] * 3 + [(3, 50)] * 3
    again = rf.experiment(heads=5, keys=(1, 3), samples=(50,), seed=2)
    assert [p.as_dict() for p in again.points] == figures["points"]


@pytest.mark.door
def test_door():
    for words, message in ((["--keys", "x"], "keys is 'x'"), (["--heads", "0"], "heads is 0")):
        done = CliRunner().invoke(app, ["bench", "rf", *words])
        assert done.exit_code == 2
        assert message in done.stderr
