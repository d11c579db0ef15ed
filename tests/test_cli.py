"""The `heedful` command: list and show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import heedful
from heedful.cli import app
from heedful.registry import index

ROOT = Path(__file__).parent.parent


def run(*words: str):
    return CliRunner().invoke(app, words)


def test_list_json_has_everything_registered():
    rows = json.loads(run("list", "--json").output)
    assert [r["name"] for r in rows] == sorted(index())
    for row in rows:
        assert Path(row["path"]).is_file()
        assert {
            "paper",
            "kind",
            "tags",
            "also",
            "causal",
            "cross",
            "decode",
            "spatial",
            "exempt",
        } <= row.keys()
    eca = next(r for r in rows if r["name"] == "eca")
    assert (eca["paper"], eca["kind"], eca["spatial"], eca["also"]) == (
        "eca",
        "channel",
        [1, 2, 3],
        ["eca-ns"],
    )


def test_list_filters_and_table():
    names = [r["name"] for r in json.loads(run("list", "--tag", "gate", "--json").output)]
    assert names == sorted(e.name for e in index().values() if "gate" in e.tags)
    names = [r["name"] for r in json.loads(run("list", "--kind", "pool", "--json").output)]
    assert names == sorted(e.name for e in index().values() if e.kind == "pool")
    out = run("list").output
    assert all(name in out for name in index())


def test_list_is_light():
    code = (
        "import sys\nfrom heedful.cli import app\nsys.argv = ['heedful', 'list', '--json']\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_show_says_everything():
    done = run("show", "eca")
    assert done.exit_code == 0
    for part in (
        "eca  (channel)",
        "see also: eca-ns",
        "Channel gate",
        "sigmoid(s)",
        "src/heedful/mixers/channel/eca.py",
        'heedful.create("eca", dim=16)',
        "O(N C + C k)",
        "What proves it",
        "@misc{",
        "1910.03151",
    ):
        assert part in done.output, part


@pytest.mark.parametrize("name", sorted(index()))
def test_show_works_for_every_entry(name):
    assert run("show", name).exit_code == 0
    told = json.loads(run("show", name, "--json").output)
    assert told["name"] == name
    assert told["source"] is None or told["source"]["bibtex"].startswith("@misc{")


def test_show_by_alias_and_paper():
    assert json.loads(run("show", "dense", "--json").output)["name"] == "self-attention"
    paper = index()["self-attention"].paper
    assert json.loads(run("show", paper, "--json").output)["paper"] == paper


def test_show_draws(tmp_path):
    file = tmp_path / "eca.svg"
    done = run("show", "eca", "--plot", str(file))
    assert done.exit_code == 0
    assert str(file) in done.output.replace("\n", "")
    assert "<svg" in file.read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("show", "ecca"), "heedful: nothing is called 'ecca'; did you mean 'eca'"),
        (("list", "--tag", "no-such"), "heedful: tag is 'no-such', must be one of"),
        (("show", "eca", "--plot", "no/such/folder/a.png"), "heedful: [Errno 2]"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(words, line):
    done = run(*words)
    assert done.exit_code == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [(), ("list",), ("show",), ("compare",), ("bench",)])
def test_help(words):
    done = run(*words, "--help")
    assert done.exit_code == 0
    assert "Usage: " in done.output


def test_version():
    assert run("--version").output == f"heedful {heedful.__version__}\n"


@pytest.mark.door
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ops", "--lengths", "0,64"), "lengths is '0,64', must be whole numbers of at least 1"),
        (("ops", "--mechanisms", "--grid", "8x0"), "grid is '8x0', must be sizes of maps"),
        (("recurrences", "--lengths", "many"), "lengths is 'many', must be whole numbers of at least 1"),
        (("recurrences", "--lengths", "64,"), "lengths is '64,', must be whole numbers of at least 1"),
        (("icl", "--heads", "-1"), "heads is '-1', must be whole numbers of at least 1"),
        (("rf", "--keys", "2;3"), "keys is '2;3', must be whole numbers of at least 1"),
        (
            ("rf", "--json", "/no/such/place/f.json"),
            "/no/such/place is not a folder; f.json cannot be written",
        ),
        (("digits", "--json", "/no/such/place/f.json"), "/no/such/place is not a folder"),
    ],
)
def test_bad_options_of_bench_end_in_one_line_before_anything_runs(words, said):
    result = run("bench", *words)
    assert result.exit_code == 2
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_python_m_heedful_is_the_command():
    done = subprocess.run([sys.executable, "-m", "heedful", "--version"], capture_output=True, text=True)
    assert done.stdout == f"heedful {heedful.__version__}\n"
