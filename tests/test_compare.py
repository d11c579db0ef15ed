"""`heedful compare`: who may stand where, what is measured, and what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import heedful
from heedful.bench import choices, compare, measure, presets
from heedful.bench.choices import Choice, parse
from heedful.bench.hosts import OnGrid, to_grid
from heedful.bench.influence import _over_channels, _over_tokens
from heedful.bench.presets import PRESETS
from heedful.bench.progress import Silent
from heedful.bench.report import write_html
from heedful.bench.results import Result
from heedful.bench.tasks import Recall, Task, make_tasks
from heedful.bench.verdict import judge, pareto
from heedful.cli.compare import register

TINY = replace(
    PRESETS["quick"],
    dim=16,
    depth=1,
    steps={"recall": 2, "text": 2, "images": 2},
    seeds=2,
    lengths=(32, 64),
    sides=(8,),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, and no fresh processes."""
    monkeypatch.setitem(presets.PRESETS, "quick", TINY)
    monkeypatch.setattr(compare, "step_memory", lambda *args, **kwargs: 12.5)
    monkeypatch.setattr(compare, "cost", lambda *a, tokens, side, **k: measure.Point(tokens, side, 1.0, None))


# -- choices --------------------------------------------------------------------------------------


def test_names_arguments_and_aliases_are_read() -> None:
    got = parse("dense, faster-neighborhood-attention:window=3,causal=true ,eca,agent-attention:size=8x8")
    assert [(c.entry.name, c.given) for c in got] == [
        ("self-attention", ()),
        ("faster-neighborhood-attention", (("window", 3), ("causal", True))),
        ("eca", ()),
        ("agent-attention", (("size", (8, 8)),)),
    ]
    assert got[1].label == "faster-neighborhood-attention:window=3,causal=True"
    assert got[0].is_baseline
    assert not parse("dense:heads=2")[0].is_baseline
    assert [c.label for c in parse("eca,eca")] == ["eca"]


@pytest.mark.door
def test_unknown_names_and_arguments_are_answered_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no mechanism is called 'biforme'; did you mean 'biformer'"):
        parse("dense,biforme")
    with pytest.raises(ValueError, match=r"eca has no argument 'windw'; it has dim, "):
        parse("eca:windw=3")
    with pytest.raises(ValueError, match="no mixer is named"):
        parse(" , ")


@pytest.mark.parametrize(
    ("mixer", "task", "reason"),
    [
        ("eca", "text", "eca mixes channels; the task text needs a causal sequence mixer"),
        ("ggem", "recall", "ggem turns a set into one vector; the task recall needs a causal sequence mixer"),
        (
            "biformer",
            "text",
            "biformer takes maps with 2 spatial axes; the task text needs a causal sequence",
        ),
        ("metaformer-poolformer", "text", "metaformer-poolformer sees the future"),
        ("lightning-attention-2", "images", "lightning-attention-2 always hides what comes later"),
        ("dense", "text", None),
        ("dense", "images", None),
        ("eca", "images", None),
        ("ggem", "images", None),
        ("biformer", "images", None),
        ("faster-neighborhood-attention", "recall", None),
        ("faster-neighborhood-attention", "images", None),
    ],
)
def test_refusals_say_why(mixer: str, task: str, reason: str | None) -> None:
    got = parse(mixer)[0].refusal(make_tasks(task)[0])
    assert got is None if reason is None else got is not None and got.startswith(reason)


def test_constructor_arguments_fit_the_task_and_the_code_runs() -> None:
    arguments = parse("biformer")[0].arguments(dim=64, causal=False, side=8)
    assert arguments == {"dim": 64, "heads": 4, "regions": 4}
    line = parse("dense")[0].code(parse("dense")[0].arguments(dim=64, causal=True, side=None))
    assert line == 'heedful.create("self-attention", dim=64, heads=4, causal=True)'
    assert isinstance(eval(line, {"heedful": heedful}), nn.Module)
    # A mixer that hides the future by default is opened up for images.
    gated = parse("gated-attention")[0]
    for causal in (True, False):
        assert gated.mixer(dim=16, causal=causal, side=None if causal else 4).causal is causal


@pytest.mark.parametrize("mixer", [name for name in choices.DEFAULT if name not in ("eca", "ggem")])
def test_sequence_networks_do_not_see_the_future(mixer: str) -> None:
    task = Recall(length=24, pairs=3, queries=5, batch_size=2)
    choice = parse(mixer)[0]
    if choice.refusal(task):
        pytest.skip("does not stand in sequence networks")
    torch.manual_seed(0)
    model = choice.host(task, dim=16, depth=2).eval()
    tokens = task.batch(torch.Generator().manual_seed(0))[0]
    changed = tokens.clone()
    changed[:, 15:] = 1
    torch.testing.assert_close(model(tokens)[:, :15], model(changed)[:, :15], rtol=1e-5, atol=1e-5)


# -- measures -------------------------------------------------------------------------------------


def test_flops_of_dense_attention_are_those_of_its_products() -> None:
    mixer = heedful.create("self-attention", 16, heads=4)
    projections, scores = 2 * 24 * 16 * 16 * 4, 2 * 24 * 24 * 16 * 2
    assert measure.flops(mixer, torch.randn(1, 24, 16)) == projections + scores


def test_a_fresh_process_measures_time_and_memory() -> None:
    dense = parse("dense")[0]
    point = measure.cost(dense, dim=64, tokens=4096, side=None, device="cpu")
    assert not isinstance(point, str)
    assert point.milliseconds > 0
    assert (
        point.memory_mib is None or 4 < point.memory_mib < 500
    )  # x, q, k, v and their gradients: 1 MiB each
    broken = Choice(dense.entry, (("heads", 3),))
    assert "heads is 3" in str(measure.cost(broken, dim=64, tokens=64, side=None, device="cpu"))


def test_jacobian_norms_of_channel_and_pool_mixers_are_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    channel = OnGrid(heedful.create("eca", 6).double(), 2)
    full = torch.autograd.functional.jacobian(channel, x)[0, :, :, 0]  # (n, c, m, d)
    torch.testing.assert_close(_over_channels(channel, x), full.sum(0).square().sum(1).sqrt())

    pool = heedful.create("ggem", 6, groups=2).double()
    full = torch.autograd.functional.jacobian(pool, x)[0, :, 0]  # (c, m, d)
    torch.testing.assert_close(_over_tokens(pool, x), full.square().sum(2).sqrt())


def test_jacobian_norms_of_token_mixers_are_estimated_without_bias() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 16, 256)
    mixer = OnGrid(heedful.create("metaformer-poolformer", 256), 2)  # linear: every channel alike
    full = torch.autograd.functional.jacobian(lambda y: mixer(y)[..., 0], x)[0, :, 0, :, 0]
    norm = full.abs() * 256**0.5
    got = _over_tokens(mixer, x)
    assert torch.equal(got == 0, norm == 0)
    torch.testing.assert_close(got, norm, rtol=0.15, atol=0)
    assert to_grid(x).shape == (1, 256, 4, 4)


def test_a_budget_scales_the_steps_and_nothing_else() -> None:
    quick = PRESETS["quick"]
    recall, text, _ = tasks = make_tasks()
    training = quick.seconds(recall) + 2 * quick.seconds(text)
    got = quick.within((2 * training + 10 * presets.MEASURE_SECONDS) / 60, [recall, text, text], 10)
    assert quick.seconds(recall) == quick.steps["recall"] * quick.seeds * 16 * 128 * presets.TOKEN_SECONDS
    assert [t.tokens for t in tasks] == [16 * 128, 8 * 256, 32 * 64]
    assert got == replace(quick, steps={t: 2 * n for t, n in quick.steps.items()})
    assert set(quick.within(0.01, [recall], 10).steps.values()) == {presets.FEWEST}


# -- verdict --------------------------------------------------------------------------------------


def test_pareto_against_its_definition() -> None:
    points = [
        tuple(p)
        for p in torch.randint(6, (60, 2), generator=torch.Generator().manual_seed(0)).double().tolist()
    ]
    for p, free in zip(points, pareto(points), strict=True):
        beaten = any((q[0] >= p[0] and q[1] > p[1]) or (q[0] > p[0] and q[1] >= p[1]) for q in points)
        assert free is not beaten
    assert pareto([(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (2.0, 1.0)]) == [True, True, False, True]


def _result(label: str, quality: float, throughput: float, task: Task) -> Result:
    return Result(
        mixer=label, task=task.name, label=label, kind="sequence", baseline=label == "self-attention",
        arguments={"dim": 16}, code=f"heedful.create({label!r}, dim=16)", quality=quality,
        quality_name=task.measure.name, higher_is_better=task.measure.higher_is_better, quality_spread=0.0,
        quality_seeds=[quality], goal=task.goal, throughput=throughput, throughput_unit="tokens/s",
        peak_memory_mib=10.0, parameters=1, flops_per_unit=1.0, flops_unit="FLOPs/token", steps=7,
        device="cpu", threads=1,
    )  # fmt: skip


def test_advice_takes_the_fastest_of_like_quality() -> None:
    recall, text = make_tasks("recall")[0], make_tasks("text")[0]
    found = [
        _result("self-attention", 0.99, 100.0, recall),
        _result("good", 0.985, 150.0, recall),
        _result("hasty", 0.5, 900.0, recall),
    ]
    said = judge(found, recall)
    assert [r.recommended for r in found] == [False, True, False]
    assert [r.pareto for r in found] == [True, True, True]
    assert said.startswith(
        "On recall: take good, accuracy 0.985 (best: self-attention, 0.990), trains 1.5 times"
    )
    found = [
        _result("self-attention", 2.5, 100.0, text),
        _result("better", 2.4, 90.0, text),
    ]  # lower is better
    judge(found, text)
    assert [r.recommended for r in found] == [False, True]


def test_a_baseline_that_did_not_learn_is_blamed_on_the_budget() -> None:
    task = make_tasks("recall")[0]
    found = [_result("self-attention", 0.2, 100.0, task), _result("other", 0.99, 90.0, task)]
    said = judge(found, task)
    assert "7 steps are too few to judge any mixer" in said
    assert "--budget" in said
    assert not any(r.recommended for r in found)


# -- the whole ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_same_seeds_same_figures_and_complete_output(tmp_path: Path) -> None:
    plan = compare.plan(mixers="eca,sqa:heads=2")
    found, again = compare.compare(plan), compare.compare(plan)
    assert not found.failed
    assert [(r.label, r.task, r.quality_seeds) for r in found.results] == [
        (r.label, r.task, r.quality_seeds) for r in again.results
    ]
    assert len({q for r in found.results for q in r.quality_seeds}) > len(found.results)  # seeds differ
    assert [(r.task, r.label) for r in found.results] == [
        ("recall", "self-attention"), ("recall", "sqa:heads=2"),
        ("text", "self-attention"), ("text", "sqa:heads=2"),
        ("images", "self-attention"), ("images", "eca"), ("images", "sqa:heads=2"),
    ]  # fmt: skip
    assert {(m.label, m.task) for m in found.refused} == {("eca", "recall"), ("eca", "text")}

    found.write_json(tmp_path / "figures.json")
    listed = json.loads((tmp_path / "figures.json").read_text())
    assert isinstance(listed, list)
    for item in listed:
        assert {"mixer", "task", "quality", "quality_spread", "throughput", "peak_memory_mib"} <= set(item)
        assert {"parameters", "flops_per_unit", "cost_curve", "pareto", "code"} <= set(item)
        sizes = [p["tokens"] for p in item["cost_curve"]]
        assert sizes == ([64] if item["task"] == "images" else [32, 64])

    write_html(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|url\(", page)
    assert all(address.startswith("data:image/") for address in re.findall(r'src="([^"]*)"', page))
    assert page.count("<img") == 3 + 2 + len(found.results)  # scatter plots, cost curves, influences
    assert all(r.label in page for r in found.results)


class _Impatient(Silent):
    """Presses Ctrl-C when the second mixer starts."""

    def __init__(self) -> None:
        self.finished = 0

    def finish(self, seconds: float, line: str = "") -> None:
        self.finished += 1

    def step(self, step: int, loss: float) -> None:
        if self.finished:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("tiny")
def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    found = compare.compare(compare.plan(task="recall", mixers="sqa"), _Impatient())
    assert found.interrupted
    assert [r.label for r in found.results] == ["self-attention"]
    assert [(m.label, m.reason) for m in found.not_run] == [("sqa", "interrupted")]
    found.write_json(tmp_path / "figures.json")
    write_html(found, tmp_path / "report.html")
    assert "interrupted" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("tiny")
def test_what_the_budget_does_not_reach_is_reported() -> None:
    plan = replace(compare.plan(task="recall", mixers="sqa", budget=5.0), deadline=-1.0)
    found = compare.compare(plan)
    assert not found.results
    assert [m.label for m in found.not_run] == ["self-attention", "sqa"]
    assert found.advice["recall"] == "On recall: nothing was measured."


@pytest.mark.usefixtures("tiny")
def test_a_mixer_that_fails_does_not_end_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck")

    plan = compare.plan(task="images", mixers="eca,ggem")
    monkeypatch.setattr(parse("eca")[0].entry.load(), "forward", forward)
    found = compare.compare(plan)
    assert [r.label for r in found.results] == ["self-attention", "ggem"]
    assert [(m.label, m.reason) for m in found.failed] == [("eca", "out of luck")]


# -- the command ----------------------------------------------------------------------------------


def _command(*arguments: str):  # type: ignore[no-untyped-def]
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [*arguments])


@pytest.mark.door
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "rekall"], "there is no task 'rekall'"),
        (["--mixers", "biforme"], "did you mean 'biformer'"),
        (["--task", "text", "--mixers", "eca"], "eca mixes channels; the task text needs"),
        (["--data", "/no/such/place"], "/no/such/place does not exist"),
        (["--preset", "huge"], "preset is 'huge', must be one of 'quick', 'full'"),
        (["--budget", "0"], "budget is 0.0, must be a number of minutes above 0"),
        (["--seeds", "0"], "seeds is 0, must be a whole number of at least 1"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--json", "/no/such/place/f.json"], "/no/such/place is not a folder"),
    ],
)
def test_bad_input_gives_one_line_and_code_2(arguments: list[str], said: str) -> None:
    result = _command(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.usefixtures("tiny")
def test_the_command_prints_the_table_and_writes_its_files(tmp_path: Path) -> None:
    figures, report = tmp_path / "f.json", tmp_path / "r.html"
    result = _command(
        "--task", "images", "--mixers", "eca", "--seeds", "1", "--json", str(figures), "--report", str(report)
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "self-attention" in result.stdout
    assert "On images: no advice, because 2 steps are too few" in result.stdout
    assert [item["mixer"] for item in json.loads(figures.read_text())] == ["self-attention", "eca"]
    assert report.stat().st_size > 10_000
