"""Parity with the authors' code, file by file, and the harness that measures it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import harness
from tests.parity.harness import Adapter, Golden, adapters, array_error, run_file

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden files are not there ({GOLDEN})")
@pytest.mark.parametrize("file", adapters())
def test_equal_to_the_authors(file):
    result = run_file(GOLDEN / f"{file}.json")
    assert result.status in ("pass", "unchecked"), result.reason


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """A folder of made-up golden files, each with an adapter of its own."""

    def write(file, arrays, run=None, given=True, **declared):
        stated = {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in arrays.items()}
        told = {"card": "made-up", "config": {"factor": 3}, "arrays": stated}
        path = tmp_path / f"{file}.json"
        path.write_text(json.dumps(told))
        if given:
            np.savez(path.with_suffix(".npz"), **arrays)
        if run is not None:
            monkeypatch.setitem(harness._adapters, file, Adapter(file, run, **declared))
        return path

    return write


X = np.linspace(-1, 2, 6, dtype=np.float32).reshape(2, 3)
ARRAYS = {
    "in.x": X,
    "param.a.w": np.float32(2.0),
    "out.y": (6 * X).astype(np.float32),
    "out.n": np.array([1, 2]),
}


def right(config, params, inputs):
    assert params.keys() == {"a.w"}
    return {"y": inputs["x"] * params["a.w"] * config["factor"], "n": torch.tensor([1, 2]), "more": None}


def test_pass_unchecked_and_missing(golden):
    passed = run_file(golden("right", ARRAYS, right))
    assert (passed.status, passed.card) == ("pass", "made-up")
    assert passed.error < 1e-6
    unchecked = run_file(golden("shapes", ARRAYS, right, given=False))
    assert (unchecked.status, unchecked.error) == ("unchecked", None)
    assert run_file(golden("nobody", ARRAYS)).status == "missing"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda y: {"y": y * 1.001, "n": torch.tensor([1, 2])}, "y differs, error 0.001"),
        (lambda y: {"y": -y, "n": torch.tensor([1, 2])}, "y differs, error 2"),
        (lambda y: {"y": y, "n": torch.tensor([1, 3])}, "n differs, error inf"),
        (lambda y: {"y": y}, "n is not among the outputs"),
        (lambda y: {"y": y[:1], "n": torch.tensor([1, 2])}, r"y is \(1, 3\)"),
        (lambda y: {"y": y.double(), "n": torch.tensor([1, 2])}, "torch.float64"),
        (lambda y: {"y": y / 0, "n": torch.tensor([1, 2])}, "y differs, error inf"),
        (lambda y: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_fail(golden, wrong, reason):
    result = run_file(golden("wrong", ARRAYS, lambda c, p, i: wrong(right(c, p, i)["y"])))
    assert result.status == "fail"
    assert re.search(reason, result.reason)


def test_what_is_ignored_is_told_and_not_compared(golden):
    path = golden(
        "ties",
        ARRAYS,
        lambda c, p, i: {"y": 6 * i["x"], "n": torch.tensor([2, 1])},
        ignore={"n*": "ties come in any order"},
    )
    result = run_file(path)
    assert (result.status, result.reason) == ("pass", "n* is not compared: ties come in any order")


def test_inputs_are_seeded_and_can_be_replaced(golden):
    arrays = {
        "in.x": X,
        "in.index": np.zeros(4, np.int64),
        "in.mask": np.ones(50, bool),
        "param.running_var": X,
        "out.y": X,
    }
    seen = []

    def run(config, params, inputs):
        seen.append((params, inputs))
        return {"y": inputs["x"]}

    path = golden(
        "drawn", arrays, run, given=False, inputs=lambda config, drawn: drawn | {"index": torch.arange(4)}
    )
    assert run_file(path) == run_file(path)
    (params, inputs), (_, again) = seen
    assert torch.equal(inputs["x"], again["x"])
    assert torch.equal(inputs["index"], torch.arange(4))
    assert 0 < inputs["mask"].sum() < 50
    assert (params["running_var"] > 0).all()
    assert 0.05 < float(Golden.read(path).draw()["in.x"].std()) < 0.9


def test_error_of_an_array():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([1.0, -4.0, inf, nan, -inf])
    assert array_error(a, a) == 0.0
    assert array_error(a + torch.tensor([0.2, 0, 0, 0, 0]), a) == pytest.approx(0.05)
    for other in ([1.0, -4.0, inf, nan, inf], [1.0, -4.0, inf, inf, -inf], [1.0, -4.0, inf, nan, 0.0]):
        assert array_error(torch.tensor(other), a) == inf
    assert array_error(torch.full((3,), 0.25), torch.zeros(3)) == 0.25
    assert array_error(torch.zeros(0), torch.zeros(0)) == 0.0
    assert array_error(torch.tensor([True]), torch.tensor([False])) == inf


def test_command(golden, tmp_path):
    golden("nobody", ARRAYS)
    out = tmp_path / "results" / "out.json"
    out.parent.mkdir()
    command = [sys.executable, "-m", "tests.parity", "--golden", str(tmp_path), "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 missing" in done.stdout
    assert json.loads(out.read_text()) == [
        {"file": "nobody", "card": "made-up", "status": "missing", "error": None, "reason": "no adapter"}
    ]


def test_command_without_files(tmp_path, monkeypatch, capsys):
    from tests.parity.__main__ import main

    monkeypatch.setattr(sys, "argv", ["parity", "--golden", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "no golden file" in capsys.readouterr().err


def test_command_fails_where_a_file_fails(golden, tmp_path, monkeypatch, capsys):
    from tests.parity.__main__ import main

    golden("wrong", ARRAYS, lambda c, p, i: {"y": -6 * i["x"], "n": torch.tensor([1, 2])})
    golden("right", ARRAYS, right)
    monkeypatch.setattr(sys, "argv", ["parity", "--golden", str(tmp_path)])
    assert main() == 1
    assert "1 pass, 1 fail, 0 unchecked, 0 missing" in capsys.readouterr().out
