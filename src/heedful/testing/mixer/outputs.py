"""Every shape goes in, and the right shape comes out."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from heedful.mixers.mixer import Mixer
from heedful.testing.mixer.check import check
from heedful.testing.subject import Subject, assert_close, assert_finite, assert_output, run


@check()
def output(subject: Subject) -> None:
    """The output has the shape its kind promises and the dtype of x."""
    mixer = subject.make()
    inputs = mixer.example_inputs()
    assert_output(subject.entry, inputs["x"], run(mixer, inputs), f"x {tuple(inputs['x'].shape)}")


@check()
def odd_sizes(subject: Subject) -> None:
    """Any length and any size will do: one token, a single pixel, a line, no multiple of a block."""
    for overrides in subject.variants():
        mixer = subject.make(**overrides)
        for shape in subject.shapes():
            _assert_runs(subject, mixer, shape)


@check()
def empty_input(subject: Subject) -> None:
    """No batch rows give no rows, no tokens no tokens; a pool of no tokens is finite or refused as x."""
    for overrides in subject.variants():
        mixer = subject.make(**overrides)
        _assert_runs(subject, mixer, {"batch": 0})
        if subject.entry.kind == "pool":
            with contextlib.suppress(ValueError):
                y = run(mixer, mixer.example_inputs(length=0))
                assert_finite(y, "a pool of no tokens")
        elif subject.entry.kind not in ("grid", "channel"):
            _assert_runs(subject, mixer, {"length": 0})


@check(lambda entry: entry.kind == "sequence")
def explicit_positions(subject: Subject) -> None:
    """Positions 0, 1, 2, ... given, for all rows or for each, are the default."""
    for overrides in subject.variants():
        mixer = subject.make(dtype=torch.float64, **overrides)
        inputs = mixer.example_inputs(dtype=torch.float64)
        expected = run(mixer, inputs)
        batch, length = inputs["x"].shape[:2]
        for positions in (torch.arange(length), torch.arange(length).expand(batch, length)):
            y = run(mixer, {**inputs, "positions": positions})
            assert_close(
                y, expected, f"positions 0, 1, 2, ... of shape {tuple(positions.shape)} to be the default"
            )


def _assert_runs(subject: Subject, mixer: Mixer, shape: dict[str, Any]) -> None:
    try:
        inputs = mixer.example_inputs(**shape)
        y = run(mixer, inputs)
    except Exception as error:
        raise AssertionError(f"expected {shape} to run, got {type(error).__name__}: {error}") from error
    assert_output(subject.entry, inputs["x"], y, str(shape))
