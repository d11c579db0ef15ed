"""`heedful bench recurrences`: every operator is measured; what a token costs is compared between lengths."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from heedful.bench import recurrences
from heedful.bench.recurrences import Pace, unevenness
from heedful.cli import app


def test_unevenness_is_of_a_token_and_leaves_short_lengths_out():
    found = [Pace("a", n, 0.0, cost * n, None) for n, cost in ((2048, 9.0), (4096, 1.0), (8192, 1.25))]
    assert unevenness(found) == pytest.approx(0.25)
    assert unevenness(found[:2]) is None


@pytest.mark.parametrize("name", recurrences.OPS)
def test_all_inputs_take_gradients(name):
    """The backward pass that is timed is the whole one."""
    run, leaves = recurrences.OPS[name](70, "cpu")
    run().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in leaves)


def test_command(tmp_path):
    file = tmp_path / "points.json"
    options = ["--ops", "linear", "--lengths", "64,128", "--repeats", "1", "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", "recurrences", *options])
    assert result.exit_code == 0, result.output
    points = json.loads(file.read_text())
    assert [p["length"] for p in points] == [64, 128]
    assert all(p["both_ratio"] == p["dense_both"] / p["both"] for p in points)


@pytest.mark.door
def test_unknown_names_are_errors_at_the_door():
    result = CliRunner().invoke(app, ["bench", "recurrences", "--ops", "rnn"])
    assert result.exit_code != 0
    assert "must be one of linear" in result.output
