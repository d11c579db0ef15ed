"""Backbones as ONNX files, and the commands around published models."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from heedful import models
from heedful.cli import app
from heedful.models.export import export_onnx
from heedful.registry import index

DEVICES = [
    "efficientvit-cga-backbone",
    "metaformer-poolformer-backbone",
    "patnet-backbone",
    "shvit-backbone",
    "spartan-backbone",
    "van-lka-backbone",
]


@pytest.mark.compiled
@pytest.mark.parametrize("family", DEVICES)
def test_families_for_devices_become_onnx(family, tmp_path):
    cls = index()[family].load()
    torch.manual_seed(0)
    model = cls(**cls.example).train()
    error = export_onnx(model, tmp_path / "out.onnx", size=cls.example_size)
    assert error < 1e-4  # a few layers in float32
    assert model.training
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(5, model.in_channels, *cls.example_size)  # any batch
    (y,) = session.run(None, {"image": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.compiled
@pytest.mark.parametrize("family", DEVICES)
def test_families_for_devices_compile_without_a_break(family):
    cls = index()[family].load()
    torch.manual_seed(0)
    model = cls(**cls.example).eval()
    x = model.example_inputs()["x"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def run(*words):
    return CliRunner().invoke(app, [*words])


def test_models_command():
    told = json.loads(run("models", "--json").stdout)
    assert {n["name"] for n in told} == {n.name for n in models.list()}
    tiny = next(n for n in told if n["name"] == "biformer_tiny")
    assert (tiny["parameters"], tiny["flops"], tiny["size"]) == (13142760, "2.2G", 224)
    assert "biformer_tiny" in run("models", "--family", "biformer-backbone").stdout
    wrong = run("models", "--family", "no-such")
    assert wrong.exit_code == 2 and "family is 'no-such', must be one of" in wrong.stderr


def test_export_command_refuses_what_it_cannot_do(tmp_path):
    wrong = run("export", "shvit_s9", str(tmp_path / "a.onnx"))
    assert wrong.exit_code == 2 and "no model is called 'shvit_s9'; did you mean" in wrong.stderr
    wrong = run(
        "export", "shvit_s1", str(tmp_path / "a.onnx"), "--weights", str(tmp_path / "none.safetensors")
    )
    assert wrong.exit_code == 2 and "none.safetensors" in wrong.stderr
