"""In-context linear regression: the layer by loops, the identities between estimators, the experiment."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from heedful.bench import icl
from heedful.cli import app

TASK = icl.LinearRegression(5, 40, 0.1)
F64 = torch.float64


def prompt(seed=0, length=40):
    torch.manual_seed(seed)
    return (
        torch.randn(3, length, 5, dtype=F64),
        torch.randn(3, length, dtype=F64),
        torch.randn(3, 5, dtype=F64),
    )


def test_layer_by_loops():
    torch.manual_seed(0)
    layer = icl.ICLAttention(4, heads=3, out=2).double()
    pairs = torch.randn(2, 7, 4, dtype=F64)
    query = torch.randn(2, 1, 4, dtype=F64, requires_grad=True)
    expected = []
    for b in range(2):
        total = 0
        for h in range(3):
            own = slice(4 * h, 4 * h + 4)
            q = layer.query.weight[own] @ query[b, 0]
            scores = [q @ (layer.key.weight[own] @ z) / 2.0 for z in pairs[b]]
            weights = torch.stack(scores).softmax(0)
            mixed = sum(w * (layer.value.weight[own] @ z) for w, z in zip(weights, pairs[b], strict=True))
            total = total + layer.out.weight[:, own] @ mixed
        expected.append(total)
    expected = torch.stack(expected)
    y = layer(query, pairs)[:, 0]
    torch.testing.assert_close(y, expected)
    leaves = [query, *layer.parameters()]
    grads = torch.autograd.grad(y.sin().sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad(expected.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    query_key, output_value = layer.circuits()
    # A circuit goes from the query to a pair: z_q^T (W_Q^T W_K) z.
    by_circuits = sum(
        output_value[h] @ pairs[0].T @ (query[0, 0] @ query_key[h] @ pairs[0].T).softmax(0) for h in range(3)
    )
    torch.testing.assert_close(by_circuits, y[0])


def test_two_opposite_heads_tend_to_a_debiased_gradient_step():
    x, y, x_query = prompt()
    wanted = icl.gradient_step(x, y, x_query, rate=0.8, debiased=True)
    errors = []
    for size in (1e-2, 1e-3):
        omega = torch.tensor([size, -size], dtype=F64)
        mu = torch.tensor([0.4 / size, -0.4 / size], dtype=F64)
        errors.append(float((icl.softmax_estimate(x, y, x_query, omega, mu) - wanted).abs().max()))
    assert errors[0] < 0.01
    assert errors[1] < errors[0] / 50  # what is left is of second order


def test_estimators_by_loops():
    x, y, x_query = prompt()
    for b in range(3):
        mean = x[b].mean(0)
        plain = sum(y[b, i] * (x[b, i] @ x_query[b]) for i in range(40)) * 0.7 / 40
        debiased = sum(y[b, i] * ((x[b, i] - mean) @ x_query[b]) for i in range(40)) * 0.7 / 40
        torch.testing.assert_close(icl.gradient_step(x, y, x_query, rate=0.7)[b], plain)
        torch.testing.assert_close(icl.gradient_step(x, y, x_query, rate=0.7, debiased=True)[b], debiased)
        gram = sum(torch.outer(row, row) for row in x[b]) + 0.1 * 5 * torch.eye(5, dtype=F64)
        wanted = x_query[b] @ gram.inverse() @ sum(y[b, i] * x[b, i] for i in range(40))
        torch.testing.assert_close(icl.ridge(x, y, x_query, noise=0.1)[b], wanted)
        omega, mu = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([1.5, -0.5], dtype=F64)
        wanted = 0
        for w, m in zip(omega, mu, strict=True):
            e = [(w * (x[b, i] @ x_query[b])).exp() for i in range(40)]
            wanted += m * sum(y[b, i] * e[i] for i in range(40)) / sum(e)
        torch.testing.assert_close(icl.softmax_estimate(x, y, x_query, omega, mu)[b], wanted)


def test_optimal_mu_minimises_the_approximate_loss():
    omega = torch.tensor([0.3, -0.2, 0.1], dtype=F64)
    mu = icl.optimal_mu(omega, TASK).requires_grad_()
    loss = icl.approximate_loss(omega, mu, TASK)
    (slope,) = torch.autograd.grad(loss, mu)
    mu, loss = mu.detach(), loss.detach()
    torch.testing.assert_close(slope, torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)
    matrix = [[float(a * b + 1.1 / 40 * math.exp(5 * a * b)) for b in omega.tolist()] for a in omega.tolist()]
    wanted = (
        1.1
        + sum(float(mu[i] * mu[j]) * matrix[i][j] for i in range(3) for j in range(3))
        - 2 * float(mu @ omega)
    )
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    assert icl.approximate_loss(omega, torch.zeros(3, dtype=F64), TASK) == pytest.approx(1.1)


def test_approximate_loss_is_near_the_loss_of_long_prompts():
    task = icl.LinearRegression(3, 400, 0.2)
    pairs, query, asked = task.prompts(4000, torch.Generator().manual_seed(0))
    omega, mu = torch.tensor([0.3, -0.3]), torch.tensor([1.4, -1.4])
    found = icl.softmax_estimate(pairs[..., :3], pairs[..., 3], query[:, 0, :3], omega, mu)
    measured = (found - asked).square().mean()
    # 4000 prompts scatter by 3 %, and the formula neglects what falls as 1 / length.
    assert float(measured) == pytest.approx(float(icl.approximate_loss(omega, mu, task)), rel=0.08)


def test_ridge_risk_is_what_ridge_has():
    pairs, query, asked = TASK.prompts(20000, torch.Generator().manual_seed(0))
    found = icl.ridge(pairs[..., :5], pairs[..., 5], query[:, 0, :5], noise=0.1)
    measured = float((found - asked).square().mean())
    # Four standard deviations of a mean of 20000 squares are 4 %; the formula is for large d.
    assert measured == pytest.approx(icl.ridge_risk(0.1, 5 / 40), rel=0.05)
    assert icl.ridge_risk(0.1, 1e-6) == pytest.approx(0.1, rel=1e-3)


def test_prompts():
    task = icl.LinearRegression(4, 30, 0.0)
    pairs, query, asked = task.prompts(5, torch.Generator().manual_seed(0))
    assert (pairs.shape, query.shape, asked.shape) == ((5, 30, 5), (5, 1, 5), (5,))
    beta = torch.linalg.lstsq(pairs[..., :4], pairs[..., 4:]).solution
    torch.testing.assert_close((query[..., :4] @ beta)[:, 0, 0], asked, rtol=1e-4, atol=1e-5)
    assert not query[..., 4].any()
    many = icl.LinearRegression(5, 2, 0.5).prompts(20000, torch.Generator().manual_seed(1))
    assert float(many[2].var()) == pytest.approx(1.5, rel=0.05)


def test_findings_tell_the_patterns_apart():
    good = icl.Learned(2, 0.24, 0.18, [0.2, -0.2], [2.0, -2.0], 0.02, 0.02, 0.01)
    poor = icl.Learned(2, 0.50, 0.49, [0.2, 0.3], [2.0, 1.0], 0.5, 0.5, 0.5)
    one = icl.Learned(1, 0.40, 0.30, [0.5], [1.5], 0.02, 0.02, 0.01)
    told = {"debiased gradient step": 0.24}
    assert all(f.holds for f in icl._findings([one, good], told))
    assert not any(f.holds for f in icl._findings([one, poor], told))


def test_command(tmp_path):
    file = tmp_path / "icl.json"
    words = ["bench", "icl", "--heads", "1,2", "--steps", "20", "--starts", "1", "--seed", "3"]
    done = CliRunner().invoke(app, [*words, "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "attention, heads: 2" in done.output
    assert "debiased gradient step" in done.output
    figures = json.loads(file.read_text())
    first = figures["learned"][0]
    assert (first["heads"], len(first["omega"])) == (1, 1)
    assert figures["estimators"]["ridge"] < figures["estimators"]["gradient step"] < 0.5
    again = icl.experiment(heads=(1,), steps=20, starts=1, seed=3)
    assert again.learned[0].loss == first["loss"]


@pytest.mark.door
def test_door():
    for words, message in (
        (["--heads", "two"], "heads is 'two'"),
        (["--heads", "0"], "heads is '0'"),
        (["--starts", "0"], "starts is 0"),
    ):
        done = CliRunner().invoke(app, ["bench", "icl", *words])
        assert done.exit_code == 2
        assert message in done.stderr
