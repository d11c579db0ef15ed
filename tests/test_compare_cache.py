"""`heedful compare --task cache`: the model is trained once, the figures are those of the caches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from heedful.bench import cache as bench
from heedful.bench import cache_model, cache_report
from heedful.bench.cache_model import Settings, lookup
from heedful.bench.tasks import Text
from heedful.cli import app

TINY = Settings(dim=16, layers=2, heads=2, kv_heads=1, length=64, steps=3, batch_size=2, short=32, planted=2)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path))
    monkeypatch.setattr(bench, "ROWS", 2)
    monkeypatch.setattr(bench, "DEPTHS", (0.2, 0.8))
    monkeypatch.setattr(bench, "LONG", 1)
    made = bench.plan(settings=TINY, policies="snapkv,streaming-llm", budgets=(8, 64), device="cpu")
    return replace(made, text=Text(made.text.data[:20000], "a part", length=64))


def test_the_model_is_trained_once_for_each_text_and_settings(plan):
    steps = []
    first, found = lookup(plan.text, TINY, plan.device, lambda step, loss: steps.append(loss))
    assert (found, len(steps)) == (False, 3)
    again, found = lookup(plan.text, TINY, plan.device, lambda step, loss: steps.append(loss))
    assert (found, len(steps)) == (True, 3)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not lookup(plan.text, replace(TINY, seed=1), plan.device, lambda *_: None)[1]
    assert not lookup(replace(plan.text, data=plan.text.data[1:]), TINY, plan.device, lambda *_: None)[1]


def test_figures(plan, tmp_path):
    found = bench.compare(plan)
    full, small, big, _, window = found.results
    assert [r.label for r in found.results] == [
        *("full cache", "snapkv 8", "snapkv 64", "streaming-llm 8", "streaming-llm 64"),
    ]
    assert big.bits == pytest.approx(full.bits, abs=1e-5) and window.bits == pytest.approx(
        full.bits, abs=1e-5
    )
    assert big.retrieval == full.retrieval and set(full.retrieval) == {0.2, 0.8}
    # 63 tokens were read; 48 of them as a prompt, of which the small cache keeps 8
    assert full.held == big.held == 63 * 2 * 8 * 4 * 2
    assert small.held == pytest.approx((8 + 15) * 2 * 8 * 4 * 2)
    assert all(r.milliseconds > 0 and r.seconds > 0 and 0 < r.bits < 9 for r in found.results)
    assert "train it longer" in cache_report.advice(found)
    for r in (full, big):
        object.__setattr__(r, "retrieval", {0.2: 1.0, 0.8: 1.0})
    assert "No cache that holds less" in cache_report.advice(found)
    found.write_json(tmp_path / "told.json")
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["results"][1]["label"] == "snapkv 8" and told["settings"]["steps"] == 3
    cache_report.write_html(found, tmp_path / "told.html")
    page = (tmp_path / "told.html").read_text()
    assert "snapkv 64" in page and "data:image/svg+xml" in page and "http://" not in page.split("</style>")[1]
    assert cache_report.table(found).row_count == 5


def test_planted_keys_can_be_looked_up():
    text = Text(b"x" * 20000, "nothing", length=64)
    window, weight = cache_model._windows(text, TINY, 64, torch.Generator().manual_seed(0))
    lines = bytes(window[0].tolist()).split(b"key~")[1:]
    assert len(lines) == 2 and lines[0][:3] == lines[1][:3] and len(set(lines[0][:3])) == 3
    weighted = bytes(window[0][weight[0] > 1].tolist())
    assert weighted == lines[1][:3]  # the first line cannot be known
    assert len(window) == 2 and len(cache_model._windows(text, TINY, 32, torch.Generator())[0]) == 4


def test_lines_stand_anywhere_and_do_not_overlap():
    """On a grid a model would learn to look a multiple of its step back, and find nothing elsewhere."""
    text = Text(b"x" * 20000, "nothing", length=64)
    many = replace(TINY, batch_size=300, planted=3)
    windows, _ = cache_model._windows(text, many, 64, torch.Generator().manual_seed(0))
    rows = [bytes(row.tolist()) for row in windows]
    assert {row.count(b"\nkey~") for row in rows[::2]} == {3}
    assert {row.count(b"\nkey~") for row in rows[1::2]} == {2}
    assert all(len({line[:3] for line in row.split(b"\nkey~")[1:]}) == 1 for row in rows)
    apart = {row.rindex(b"key~") - row.index(b"key~") for row in rows[::2]}
    assert len(apart) > 20
    assert {row.rindex(b"key~") for row in rows[1::2]} == {57}  # asked at the end
    assert len({row.index(b"key~") for row in rows[1::2]}) > 30


@pytest.mark.door
def test_errors_name_the_argument():
    run = CliRunner().invoke
    for words, said in (
        (["--mixers", "snapkw"], "no cache policy is called 'snapkw'"),
        (["--seeds", "2"], "the task cache has no seeds"),
        (["--steps", "0"], "steps is 0"),
        (["--json", "/nowhere/x.json"], "is not a folder"),
    ):
        result = run(app, ["compare", "--task", "cache", *words])
        assert result.exit_code == 2 and said in result.output
    with pytest.raises(ValueError, match="budgets has 4, must be at least 8"):
        bench.plan(budgets=[4])
