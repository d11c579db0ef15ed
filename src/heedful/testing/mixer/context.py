"""Queries from x, keys and values from a context."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.mixers.mixer import Mixer
from heedful.testing.mixer.check import check, takes_context
from heedful.testing.subject import TOLERANCE, Inputs, Subject, assert_close, assert_output, error, noise, run


@check(takes_context)
def context_length(subject: Subject) -> None:
    """A context may have any length, none included, and what it holds matters."""
    mixer = subject.make(dtype=torch.float64)
    inputs = mixer.example_inputs(dtype=torch.float64)
    for length in (0, 1, 5, 23):
        context = _context(mixer, inputs, length)
        y = run(mixer, {**inputs, "context": context})
        assert_output(subject.entry, inputs["x"], y, f"a context of {length} tokens")
        if length > 1:
            other = run(mixer, {**inputs, "context": context + noise(context)})
            assert error(other, y) > TOLERANCE[torch.float64], "expected the output to depend on the context"


@check(takes_context)
def context_mask(subject: Subject) -> None:
    """What masked context tokens hold has no influence, and a context all masked is finite."""
    mixer = subject.make(dtype=torch.float64)
    inputs = mixer.example_inputs(dtype=torch.float64)
    context = _context(mixer, inputs, 13)
    mask = torch.ones(context.shape[:2], dtype=torch.bool)
    plain = run(mixer, {**inputs, "context": context})
    assert_close(
        run(mixer, {**inputs, "context": context, "context_mask": mask}),
        plain,
        "a context_mask of all True to be none",
    )
    mask[0, 9:], mask[1, 3:6] = False, False
    y = run(mixer, {**inputs, "context": context, "context_mask": mask})
    other = torch.where(mask[..., None], context, 1e3 * noise(context))
    changed = run(mixer, {**inputs, "context": other, "context_mask": mask})
    assert_close(changed, y, "values of masked context tokens to have no influence")
    mask[1] = False
    y = run(mixer, {**inputs, "context": context, "context_mask": mask})
    assert_output(subject.entry, inputs["x"], y, "a context all masked in one row")


def _context(mixer: Mixer, inputs: Inputs, length: int) -> Tensor:
    x = inputs["x"]
    width = inputs["context"].shape[-1] if "context" in inputs else mixer.dim
    return noise(x.new_empty(len(x), length, width), seed=5)
