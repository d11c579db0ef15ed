"""What PyTorch does with modules works with this one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heedful.mixers.mixer import Mixer
from heedful.testing.mixer.check import check
from heedful.testing.subject import Subject, assert_close, functional, run, seeded


@check()
def activation_checkpointing(subject: Subject) -> None:
    """Recomputing the forward in the backward gives the same output and gradients."""
    mixer = subject.make(dtype=torch.float64, train=True)
    again = subject.make(dtype=torch.float64, train=True)
    _assert_equal(
        mixer,
        lambda **inputs: run(mixer, inputs),
        again,
        lambda **inputs: checkpoint(again, use_reentrant=False, **inputs),
        torch.float64,
        "activation checkpointing",
    )


@check()
def compiling(subject: Subject) -> None:
    """torch.compile (backend aot_eager, graph breaks allowed) gives the same output and gradients."""
    mixer, again = subject.make(), subject.make()
    with _fresh_dynamo():
        compiled = torch.compile(again, backend="aot_eager", dynamic=False)
        _assert_equal(
            mixer, lambda **inputs: run(mixer, inputs), again, compiled, torch.float32, "torch.compile"
        )


@check()
def exporting(subject: Subject) -> None:
    """torch.export (non-strict) of the eval forward gives a program with the same output."""
    mixer = subject.make()
    inputs = mixer.example_inputs()
    with _fresh_dynamo():
        program = torch.export.export(mixer, (), kwargs=inputs, strict=False)
    assert_close(
        program.module()(**inputs), run(mixer, inputs), "the exported program to give the same output"
    )


def _assert_equal(
    mixer: Mixer,
    plain: Callable[..., Tensor],
    again: Mixer,
    other: Callable[..., Tensor],
    dtype: torch.dtype,
    name: str,
) -> None:
    found = []
    for module, forward in ((mixer, plain), (again, other)):
        inputs = module.example_inputs(dtype=dtype)
        leaves = {"x": inputs["x"].requires_grad_()}
        leaves.update((n, p) for n, p in module.named_parameters() if p.requires_grad)
        with seeded(0):
            y = forward(**inputs)
            grads = torch.autograd.grad(functional(y), list(leaves.values()), materialize_grads=True)
        found.append((y.detach(), dict(zip(leaves, grads, strict=True))))
    (y, expected), (other_y, got) = found
    assert_close(other_y, y, f"{name} to give the same output")
    for leaf in expected:
        assert_close(got[leaf], expected[leaf], f"{name} to give the same gradient of {leaf}")


@contextlib.contextmanager
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()
