"""The Triton kernels become machine code for a GPU that is not here; what `auto` takes where one is."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heedful.ops.call import Call
from heedful.patterns.causal import Causal

door = importlib.import_module("heedful.ops.attention")
ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed",
)


@needs_triton
@pytest.mark.compiled
def test_every_kernel_compiles_for_hopper_and_fits(tmp_path):
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT / "src"),
    }
    command = [sys.executable, "-m", "tests.triton_build", "--widths", "64", "--dtypes", "bfloat16"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line.split() for line in result.stdout.splitlines() if line.endswith(("True", "False"))]
    names = "attend query_gradient key_gradient states mix gradients solve write write_back ends join outputs"
    assert {row[0] for row in rows} >= set(names.split())
    for name, *_, stack, shared, on_tensor_cores in rows:
        assert int(stack) <= 256, name  # registers hold all but a few numbers
        assert int(shared) <= 227 * 1024, name  # what a program may have on Hopper
        assert on_tensor_cores == "True" or name in ("ends", "join", "outputs", "gradients"), name


def _call() -> Call:
    q = torch.zeros(1, 1, 4, 4)
    return Call(q, q, q, Causal(), None, 0.5, None, None, 0, 0.0, False)


@pytest.mark.parametrize(
    ("served", "new", "compiling", "want"),
    [
        (("triton", "flex"), True, False, "triton"),
        (("triton", "flex"), False, False, "flex"),
        (("triton", "flex"), True, True, "flex"),
        (("triton",), True, True, "triton"),
        (("triton",), False, False, "tiled"),
        ((), True, False, "tiled"),
    ],
)
def test_what_auto_takes_on_a_gpu(monkeypatch, served, new, compiling, want):
    """Triton where it serves; inside torch.compile what stays in the graph; on old GPUs not Triton."""
    for name in ("triton", "flex"):
        reason = None if name in served else "does not serve"
        monkeypatch.setattr(door.BACKENDS[name], "unsupported", lambda call, reason=reason: reason)
    monkeypatch.setattr(door.triton, "suits", lambda device: new)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert door._sparse(_call()) == "tiled"
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    assert door._sparse(_call()) == want
