"""`heedful inspect` on image models: timm's, heedful's own, and the page on a picture."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import heedful
from heedful.cli import app
from heedful.inspect import (
    AttentionRollout,
    Subject,
    capture,
    head_importance_by_pruning,
    image_models,
    image_sample,
    inspect_model,
    load_subject,
    silenced,
)
from heedful.inspect.pictures import pictures
from heedful.inspect.plain_words import plain_words
from heedful.models.davit import DaViT
from heedful.models.mala import MAViT
from tests.inspect.test_report import CHROMIUM

ARGUMENTS = {"img_size": 48, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 3}
COLOURS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input_size": [3, 48, 48], "crop_pct": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as timm saves it for the hub, and a picture."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGUMENTS)
    for block in model.blocks:
        block.attn.qkv.weight.data[:12].mul_(20)  # far from uniform
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": ARGUMENTS}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": COLOURS | {"num_classes": 5}}))
    left = np.zeros((60, 80, 3), dtype=np.uint8)
    left[:, :40] = (200, 30, 60)
    Image.fromarray(left).save(folder / "picture.png")
    return folder


def run(*words):
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    done = run(folder, "--image", folder / "picture.png", "--out", out / "a.html", "--json", out / "a.json")
    assert done.exit_code == 0, done.output
    return out / "a.html"


def test_a_folder_of_timm(page):
    told = json.loads(page.with_suffix(".json").read_text())
    assert [(h["layer"], h["head"]) for h in told["heads"]] == [(i, j) for i in (0, 1) for j in range(3)]
    assert told["importance"] == "Jensen-Shannon divergence"
    assert told["samples"][0]["title"] == "picture.png" and len(told["samples"][0]["tokens"]) == 37
    text = page.read_text("utf-8")
    assert "2 layers that attend over 6 × 6 patches, 6 heads · 1 image<" in text.replace("\n", "")
    assert "hops on the grid of patches" in text and "what the class token at the top are made of" in text


def test_the_picture_is_shown_as_it_was(folder):
    subject = load_subject(str(folder), images=[folder / "picture.png"])
    address = subject.samples[0].picture
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))
    assert shown.shape == (48, 48, 3)
    assert np.abs(shown[24, 5].astype(int) - (200, 30, 60)).max() < 12  # JPEG


def test_a_name_of_timm_with_a_file(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("test_vit", pretrained=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    made = image_models.of_timm("test_vit", str(tmp_path / "w.safetensors"))
    assert torch.equal(made.model.head.weight, model.head.weight) and made.name == "test_vit"
    assert image_models.of_timm("test_vit", "random").name == "test_vit, random weights"
    picture = Image.new("RGB", (50, 40))
    assert made.pixels(picture).shape == (1, 3, 160, 160)
    sample = image_sample(made.pixels(picture), model=made.model)
    assert sample.grid == (10, 10) and sample.labels[0] == "[CLS]"


def test_mixers_of_heedful_in_a_frame():
    for name, grid in (("self-attention", False), ("neighborhood-attention", True)):
        made = image_models.of_heedful(name, None)
        assert made.name == f"{name} in 4 blocks, random weights" and made.model.on_map is grid
        sample = image_sample(made.pixels(Image.new("RGB", (300, 250), "red")), model=made.model)
        assert sample.grid == (14, 14) and sample.prefix == 0 and sample.reads == slice(0, None)
        assert Subject(made.model, name, [sample]).outcomes()[0] is False  # vectors, no logits


def test_weights_of_heedful(tmp_path):
    torch.manual_seed(3)
    model = heedful.models.create("shvit_s1")
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    made = image_models.of_heedful("shvit_s1", str(tmp_path / "w.pth"))
    for a, b in zip(made.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.warns(UserWarning, match="no attention call"), pytest.raises(ValueError, match="over: none"):
        image_sample(made.pixels(Image.new("RGB", (224, 224))), model=made.model)


def test_stages_have_layers_of_their_own():
    """A pyramid is looked at where most of its layers attend over all places of one map."""
    torch.manual_seed(0)
    narrow = {"dims": (8, 16, 24, 32), "heads": (1, 2, 3, 4), "depths": (1, 1, 3, 1), "projection": 32}
    model = MAViT(**narrow, classes=7).eval()
    sample = image_sample(torch.randn(1, 3, 32, 32), model=model)
    assert sample.grid == (2, 2)
    found = inspect_model(Subject(model, "mavit", [sample]))
    assert [(h.layer, h.head) for h in found.heads] == [(i, j) for i in range(3) for j in range(3)]
    assert found.others == 1 and not found.peaks
    assert min(h.importance for h in found.heads) > 0
    assert "class or register" not in dict(plain_words(found))["Where attention rests"]


def test_windows_are_refused():
    torch.manual_seed(0)
    model = DaViT(**DaViT.example).eval()
    with pytest.raises(ValueError, match=r"DaViT has no self-attention over all patches .* in windows"):
        image_sample(torch.randn(1, 3, 128, 128), model=model, patch=4)


@pytest.mark.parametrize("long", [False, True])
def test_heads_of_heedful_fall_silent(long):
    """Whatever computes the attention: the fused operator, or tiles."""
    torch.manual_seed(0)
    mixer = heedful.create("self-attention", 12, heads=3, qkv_bias=False).eval()
    model = torch.nn.Sequential(mixer)
    x = torch.randn(1, 1500 if long else 7, 12)
    pattern = heedful.patterns.Window(3) if long else None

    class Patterned(torch.nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (3, 4)).transpose(1, 2)
            return heedful.attention(q, q, q, pattern=pattern).transpose(1, 2).flatten(2)

    model = torch.nn.Sequential(Patterned())
    with torch.no_grad():
        before = model(x)
        with silenced(model, [("0", 1)]):
            after = model(x)
    assert not after[..., 4:8].any()
    torch.testing.assert_close(after[..., :4], before[..., :4])
    torch.testing.assert_close(after[..., 8:], before[..., 8:])
    found = head_importance_by_pruning(model, lambda: model(x)[:, 0], modules=["0"])
    assert (found.mean > 1e-3).all() and len(found.heads) == 3
    assert not head_importance_by_pruning(model, lambda: model(x)[:, 0], modules=[]).heads


@pytest.mark.door
def test_silence_that_does_nothing_is_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with (
        pytest.raises(ValueError, match="heads are of '0', which made no attention call"),
        silenced(model, [("0", 0)]),
    ):
        model(torch.zeros(1, 3))


def test_rollout_of_the_class_token(folder):
    subject = load_subject(str(folder), images=[folder / "picture.png"])
    whole = AttentionRollout()
    with torch.no_grad(), capture(subject.model, whole):
        subject.run(subject.samples[0])
    found = inspect_model(subject)
    np.testing.assert_allclose(found.views[0].rollout, whole.table[0, 0], rtol=1e-4, atol=1e-6)  # float32


def test_default_pictures(monkeypatch):
    assert [name for _, name in pictures([])] == ["china.jpg", "flower.jpg"]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    ((picture, name),) = pictures([])
    assert name == "grace_hopper.jpg" and picture.size == (512, 600)


def test_errors_are_one_line(folder, tmp_path):
    picture = ("--image", folder / "picture.png")
    for words, part in (
        (("timm:no_such_model", *picture, "--weights", "random"), "timm cannot make no_such_model"),
        (("timm:test_vit", *picture, "--weights", tmp_path / "no"), "must be a file, or 'random'"),
        (("timm:test_vit", "--text", "hello", "--weights", "random"), "takes images: give --image"),
        (("eca", *picture), "eca is a channel"),
        (("catanet_x2", *picture), "catanet_x2 is a CATANet, must be a backbone"),
        ((folder / "..", *picture, "--weights", "random"), "weights are taken for models of timm"),
    ):
        done = run(*words, "--out", tmp_path / "a.html")
        assert done.exit_code == 2, done.output
        assert part in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


PROBE = """
<script>
const lines = [];
const note = (name, value) => lines.push(name + "=" + value);
const cells = () => [...document.querySelectorAll("#view .scene rect")];
const veil = () => cells().map(r => r.getAttribute("fill-opacity")).join();
note("tiles", document.querySelectorAll("#map .tile").length);
document.querySelector('#map .tile[data-head="4"]').click();
note("clicked", document.getElementById("which").textContent);
note("cells", cells().length);
const before = veil();
const root = document.querySelector("#view .scene svg"), box = root.getBoundingClientRect();
const at = { clientX: box.left + box.width * 0.9, clientY: box.top + box.height * 0.3 };
root.dispatchEvent(new MouseEvent("mousemove", at));
note("changed", veil() !== before);
const frame = cells().pop();
note("frame", ["x", "y", "visibility"].map(key => frame.getAttribute(key)).join());
note("hint", document.getElementById("hint").textContent);
document.querySelector("#view button").dispatchEvent(new MouseEvent("mouseenter"));
note("class", document.getElementById("hint").textContent);
document.querySelector('[data-mode="distance"]').click();
note("sinks", document.querySelectorAll("#sinks figure.veiled img.veil").length);
note("rollout", document.querySelectorAll("#rollout figure.veiled img.veil").length);
note("loaded", [...document.images].every(i => i.complete && i.naturalWidth > 0));
note("errors", window.errors.length + (window.errors[0] || ""));
const found = document.createElement("pre");
found.id = "found";
found.textContent = lines.join("\\n");
document.body.appendChild(found);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_page_in_a_browser(page, tmp_path):
    watch = "<script>window.errors = []; window.onerror = m => errors.push(m);</script>\n<style>"
    text = page.read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("<style>", watch, 1).replace("</body>", PROBE + "</body>"), "utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1240,1700", "--virtual-time-budget=3000", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    found = dict(
        line.split("=", 1)
        for line in re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1].splitlines()
    )
    assert found["tiles"] == "6" and found["clicked"] == "Layer 2, head 2" and found["errors"] == "0"
    assert found["cells"] == "37" and found["changed"] == "true"  # 36 patches and the frame
    assert found["frame"] == "5,1,visible"
    assert re.match(
        r"The framed patches look most at row \d, column \d \(.*%\); \[CLS\] .*%\.", found["hint"]
    )
    assert found["class"].startswith("[CLS] looks most at row")
    assert found["sinks"] == "2" and found["rollout"] == "1" and found["loaded"] == "true"
