"""Batch rows know nothing of each other."""

from __future__ import annotations

import torch

from heedful.testing.mixer.check import check
from heedful.testing.subject import Subject, assert_close, noise, rows, run


@check()
def batch_rows(subject: Subject) -> None:
    """In eval mode a row's output is that of the row alone, whatever the other rows hold."""
    mixer = subject.make(dtype=torch.float64)
    inputs = mixer.example_inputs(batch=3, dtype=torch.float64)
    together = run(mixer, inputs)
    for row in range(3):
        alone = run(mixer, rows(inputs, [row]))
        assert_close(together[row], alone[0], f"batch row {row} to equal a run of that row alone")
    x = inputs["x"].clone()
    x[1] = 3 * noise(x[1])
    changed = run(mixer, {**inputs, "x": x})
    for row in (0, 2):
        assert_close(changed[row], together[row], f"batch row {row} not to change with row 1")
