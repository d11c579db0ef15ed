"""The same function in every precision."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.testing.mixer.check import check
from heedful.testing.subject import (
    BFLOAT16_TOLERANCE,
    TOLERANCE,
    Subject,
    assert_finite,
    assert_output,
    cast,
    error,
    functional,
    run,
)


@check()
def float64(subject: Subject) -> None:
    """In float64 the output is float64, and equals that in float32 to the rounding of float32."""
    single, double = subject.make(), subject.make(dtype=torch.float64)
    inputs = single.example_inputs()
    y = run(double, cast(inputs, torch.float64))
    assert y.dtype == torch.float64, f"expected a float64 output for a float64 input, got {y.dtype}"
    found, accepted = error(run(single, inputs).double(), y), TOLERANCE[torch.float32]
    assert found <= accepted, (
        f"expected float64 and float32 to agree; relative error {found:.1e}, accepted {accepted:.0e}"
    )


@check()
def bfloat16(subject: Subject) -> None:
    """In bfloat16 the output is bfloat16, and near that of float32 on the same rounded numbers."""
    half = subject.make(dtype=torch.bfloat16)
    full = subject.make(dtype=torch.bfloat16).float()
    inputs = half.example_inputs(dtype=torch.bfloat16)
    y = run(half, inputs)
    assert_output(subject.entry, inputs["x"], y, "a bfloat16 input")
    _assert_near(y, run(full, cast(inputs, torch.float32)))


@check()
def autocast(subject: Subject) -> None:
    """Under autocast to bfloat16 forward and backward run, finite and near float32."""
    mixer = subject.make()
    inputs = mixer.example_inputs()
    expected = run(mixer, inputs)
    inputs["x"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(mixer, inputs)
    _assert_near(y, expected)
    functional(y.float()).backward()
    for name, leaf in [("x", inputs["x"]), *mixer.named_parameters()]:
        if leaf.grad is not None:
            assert_finite(leaf.grad, f"the gradient of {name} under autocast")


def _assert_near(actual: Tensor, expected: Tensor) -> None:
    assert_finite(actual, "the output in bfloat16")
    found = ((actual.float() - expected).norm() / (expected.norm() + 1e-30)).item()
    assert found <= BFLOAT16_TOLERANCE, (
        f"expected the output to be near that of float32; relative error {found:.1e} in the Euclidean norm, "
        f"accepted {BFLOAT16_TOLERANCE:.0e}"
    )
