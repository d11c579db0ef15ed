"""`heedful bench restore`: scores, regions, what is held out, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from heedful.bench import restore
from heedful.cli import app


@pytest.fixture
def small(monkeypatch):
    """Photographs of 66 x 198 pixels: red grows downwards, green to the right."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 66), torch.linspace(0, 1, 198), indexing="ij")
    photograph = torch.stack([rows, columns, rows * columns])[None]
    monkeypatch.setattr(restore, "photographs", lambda: {"one": photograph, "two": photograph.flip(2)})
    for name, value in (("CROP", 40), ("BATCH", 2), ("SIDE", 32)):
        monkeypatch.setattr(restore, name, value)


def test_psnr():
    original = torch.full((1, 3, 4, 4), 0.5)
    assert math.isclose(restore.psnr(original + 0.1, original), 20, rel_tol=1e-5)
    assert math.isclose(restore.psnr(original + 5, original), -20 * math.log10(0.5), rel_tol=1e-5)


def test_regions_are_levels_of_brightness():
    image = torch.linspace(0, 1, 60).view(1, 1, 1, 60).expand(2, 3, 40, -1)
    regions = restore.brightness_regions(image, levels=4)
    assert regions.flatten().bincount().tolist() == [2 * 600] * 4
    assert bool((regions[:, :, 5:-5].diff(dim=2) >= 0).all())


def test_the_middle_is_held_out(small):
    photograph = restore.photographs()["one"]
    strips = restore._strips(photograph)
    assert [tuple(s.shape[2:]) for s in strips] == [(66, 66)] * 3
    torch.testing.assert_close(torch.cat(strips, 3), photograph)
    held_out = strips[1][0, 1]  # green says which column a pixel is of
    patches = restore._patches([strips[0], strips[2]], torch.Generator().manual_seed(0))
    assert patches.shape == (2, 3, 32, 32)
    low, high = float(held_out.min()), float(held_out.max())
    assert not ((patches[:, 1] >= low) & (patches[:, 1] <= high)).any()


def test_baselines():
    original = torch.rand(1, 3, 32, 32)
    job = restore.SuperResolution()
    damaged = job.damaged(original, torch.Generator())
    assert damaged.shape == (1, 3, 16, 16) and job.baseline(damaged).shape == original.shape
    noisy = restore.Denoising().damaged(original, torch.Generator().manual_seed(0))
    assert abs(float((noisy - original).std()) * 255 - 25) < 2  # of 3072 numbers


@pytest.mark.parametrize("name", [*restore.TASKS])
def test_training_improves(small, name):
    steps = []
    begun = restore.restore(name, steps=1)
    learned = restore.restore(name, steps=6, on_step=lambda step, loss: steps.append(step))
    assert steps == [*range(1, 7)]
    for before, after in zip(begun.scores, learned.scores, strict=True):
        assert before.photograph == after.photograph
        assert before.before == after.before  # the same damage
        assert after.after > before.after
        assert after.picture.size == (3 * 80 + 2 * 4, 80)


def test_command(small, tmp_path):
    out = tmp_path / "pictures"
    told = CliRunner().invoke(
        app,
        [
            *["bench", "restore", "--models", "catanet", "--steps", "1"],
            *["--out", str(out), "--json", str(tmp_path / "a.json")],
        ],
        env={"COLUMNS": "200"},
    )
    assert told.exit_code == 0, told.output
    assert "bicubic" in told.stdout and "one" in told.stdout
    with Image.open(out / "catanet-one.png") as picture:
        assert picture.size == (248, 80)
    (found,) = json.loads((tmp_path / "a.json").read_text())
    assert found["model"] == "catanet" and {s["photograph"] for s in found["scores"]} == {"one", "two"}


def test_errors():
    with pytest.raises(ValueError, match="name is 'sharpen', must be one of 'catanet'"):
        restore.restore("sharpen")
    with pytest.raises(ValueError, match="steps is 0, must be a whole number"):
        restore.restore("catanet", steps=0)
    wrong = CliRunner().invoke(app, ["bench", "restore", "--models", "catanet,sharpen"])
    assert wrong.exit_code == 2 and "models has 'sharpen', must be of catanet" in wrong.stderr


def test_the_photographs_of_scikit_learn():
    found = restore.photographs()
    assert sorted(found) == ["china", "flower"]
    assert all(p.shape == (1, 3, 427, 640) and p.min() >= 0 and p.max() <= 1 for p in found.values())
