"""`heedful bench digits` and `heedful bench models`."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from heedful.bench import digits, models
from heedful.cli import app

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_the_table_names_families():
    assert digits.TINY.keys() <= {*digits.families()}
    assert digits.families("van-lka,maxvit-backbone") == ["van-lka-backbone", "maxvit-backbone"]


@pytest.mark.parametrize("name", digits.families())
def test_every_family_has_an_instance_for_digits(name):
    x = torch.randn(2, 1, digits.SIDE, digits.SIDE)
    assert digits.tiny(name).eval()(x).shape == (2, 10)


def test_digits_learns(tmp_path):
    file = tmp_path / "digits.json"
    found = CliRunner().invoke(
        app, ["bench", "digits", "--families", "metaformer-poolformer", "--epochs", "2", "--json", str(file)]
    )
    assert found.exit_code == 0, found.output
    (row,) = json.loads(file.read_text())
    assert row["family"] == "metaformer-poolformer-backbone"
    assert row["accuracy"] > 0.5  # chance is 0.1
    assert "below 97 %" in found.output or row["accuracy"] >= 0.97


def test_held_out_third_is_fixed():
    train, held = digits.task().split
    assert len(held) == pytest.approx((len(train) + len(held)) / 3, abs=5)
    assert torch.equal(held, digits.task().split[1])
    assert not set(train.tolist()) & set(held.tolist())


def test_twins():
    assert models.twin("shvit_s1") == "shvit_s1"
    assert models.twin("maxvit_tiny") == "maxvit_tiny_tf_224"
    assert models.twin("van_b0") is None
    assert models.nearest(1.3e9) == "deit_tiny_patch16_224"


def test_models_table(tmp_path):
    file = tmp_path / "models.json"
    options = ["--models", "shvit_s1", "--batch", "2", "--rounds", "1", "--json", str(file)]
    found = CliRunner().invoke(app, ["bench", "models", *options])
    assert found.exit_code == 0, found.output
    (row,) = json.loads(file.read_text())
    assert (row["timm"], row["same"], row["parameters"]) == ("shvit_s1", True, 6_330_808)
    assert row["multiply_adds"] == pytest.approx(row["timm_multiply_adds"], rel=0.02)
    assert row["forward_ratio"] == pytest.approx(row["forward"] / row["timm_forward"])  # one round


@pytest.mark.parametrize("name", ["digits --families vann", "models --models vann_b0"])
def test_errors(name):
    found = CliRunner().invoke(app, ["bench", *name.split()])
    assert found.exit_code == 2
    assert name.split()[-1] in found.output
