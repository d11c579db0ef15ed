"""In-context linear regression: the layer by loops, the identities between estimators, the experiment."""

from __future__ import annotations

import json
import math
from dataclasses import replace

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
    good = icl.Learned(2, 1, 0.24, 0.18, {}, [0.2, -0.2], [2.0, -2.0], 0.02, 0.02, 0.01)
    poor = icl.Learned(2, 1, 0.50, 0.49, {}, [0.2, 0.3], [2.0, 1.0], 0.5, 0.5, 0.5)
    one = icl.Learned(1, 1, 0.40, 0.30, {}, [0.5], [1.5], 0.02, 0.02, 0.01)
    told = {"debiased gradient step": 0.24}
    deep = icl.Learned(2, 2, 0.18, 0.1, {}, [], [], None, None, None)
    assert all(f.holds for f in icl._findings([one, good, deep], told))
    assert not icl._findings([good, replace(deep, loss=0.23)], told)[-1].holds
    assert len(icl._findings([good], told)) == 1 + len(icl._findings([good], told, correlation=0.5))
    assert not any(f.holds for f in icl._findings([one, poor], told))


def test_correlated_inputs():
    task = icl.LinearRegression(4, 3, 0.0, correlation=0.6)
    wanted = torch.tensor([[0.6 ** abs(i - j) for j in range(4)] for i in range(4)])
    torch.testing.assert_close(task.covariance(), wanted)
    pairs, query, _ = task.prompts(20000, torch.Generator().manual_seed(0))
    for x in (pairs[:, 1, :4], query[:, 0, :4]):
        # 20000 products of spread at most sqrt(2) scatter by 0.01
        torch.testing.assert_close(x.T @ x / 20000, wanted, rtol=0, atol=0.05)
    plain = icl.LinearRegression(4, 3, 0.0).prompts(2, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(
        task.prompts(2, torch.Generator().manual_seed(0))[0][..., :4],
        plain[..., :4] @ torch.linalg.cholesky(wanted).T,
    )


def test_several_layers_by_loops():
    torch.manual_seed(0)
    model = icl.ICLLayers(4, heads=2, layers=2).double()
    pairs, query = torch.randn(2, 5, 4, dtype=F64), torch.randn(2, 1, 4, dtype=F64)
    z = torch.cat([pairs, query], dim=1).requires_grad_()
    x = z
    for layer in model.layers:
        rows = []
        for n in range(6):
            total = x[:, n]
            for h in range(2):
                own = slice(4 * h, 4 * h + 4)
                q = x[:, n] @ layer.query.weight[own].T
                e = [(((x[:, m] @ layer.key.weight[own].T) * q).sum(-1) / 2.0).exp() for m in range(n + 1)]
                mixed = sum(e[m][:, None] * (x[:, m] @ layer.value.weight[own].T) for m in range(n + 1))
                total = total + (mixed / sum(e)[:, None]) @ layer.out.weight[:, own].T
            rows.append(total)
        x = torch.stack(rows, dim=1)
    y = model(z[:, -1:], z[:, :-1])
    torch.testing.assert_close(y[:, 0, 0], x[:, -1, -1])
    grads = [torch.autograd.grad(out, z)[0] for out in (y.sin().sum(), x[:, -1, -1].sin().sum())]
    torch.testing.assert_close(*grads)


def test_prepared_starts():
    def circuits(start):
        torch.manual_seed(0)
        layer = icl.ICLAttention(3, heads=4)
        icl.prepare(layer, start)
        return layer, *layer.circuits()

    eye, size = torch.eye(3), 3**-0.5
    _, query_key, output_value = circuits("small-identity")
    torch.testing.assert_close(query_key, 1e-12 * size * eye.expand(4, 3, 3), rtol=1e-5, atol=0)
    torch.testing.assert_close(output_value, 1e-12 * eye[-1:].expand(4, 1, 3), rtol=1e-5, atol=0)
    _, opposite, same = circuits("opposite-small-identity")
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None, None]
    torch.testing.assert_close(opposite, signs * query_key, rtol=0, atol=0)
    torch.testing.assert_close(same, output_value, rtol=0, atol=0)
    random, query_key, _ = circuits("random")
    layer, prepared, _ = circuits("small-identity-qk")
    torch.testing.assert_close(prepared, 1e-8 * size * eye.expand(4, 3, 3), rtol=1e-5, atol=0)
    assert torch.equal(layer.value.weight, random.value.weight)
    assert torch.equal(layer.out.weight, random.out.weight)
    assert query_key.abs().max() > 0.01


def test_heads_that_begin_alike_stay_alike():
    told = icl.experiment(heads=(1, 2), steps=60, starts=1, start="small-identity")
    first, second = told.learned[1].omega
    assert first == pytest.approx(second, rel=1e-4)
    assert told.findings[0].holds
    opposite = icl.experiment(heads=(2,), steps=800, starts=1, start="opposite-small-identity").learned[0]
    assert opposite.omega[0] * opposite.omega[1] < 0 and opposite.mu[0] * opposite.mu[1] < 0


def test_other_lengths():
    told = icl.experiment(heads=(2,), steps=5, starts=1, lengths=(10, 80))
    assert told.learned[0].by_length[80] == told.learned[0].loss_longer
    assert list(told.learned[0].by_length) == list(told.by_length) == [10, 80]
    errors = [told.by_length[10]["ridge"], told.estimators["ridge"], told.by_length[80]["ridge"]]
    assert errors == sorted(errors, reverse=True)
    assert told.by_length[10]["ridge, by its formula"] == icl.ridge_risk(0.1, 0.5)
    correlated = icl._estimators(icl.LinearRegression(correlation=0.5))
    assert "ridge, by its formula" not in correlated


def test_command(tmp_path):
    file = tmp_path / "icl.json"
    words = [
        "bench",
        "icl",
        "--heads",
        "1,2",
        "--steps",
        "20",
        "--starts",
        "1",
        "--seed",
        "3",
        "--lengths",
        "80",
    ]
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
        (["--layers", "0"], "layers is '0'"),
        (["--lengths", "x"], "lengths is 'x'"),
        (["--start", "zero"], "start is 'zero', must be one of 'random', 'small-identity'"),
        (["--start", "small-identity", "--layers", "2"], "must be 'random' with several layers"),
        (["--start", "opposite-small-identity", "--heads", "3"], "heads is 3, must be even"),
        (["--correlation", "1"], "correlation is 1.0, must be at least 0 and below 1"),
    ):
        done = CliRunner().invoke(app, ["bench", "icl", *words])
        assert done.exit_code == 2
        assert message in done.stderr
