"""Errors at the door: a ValueError that names the argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from heedful.mixers.state import State
from heedful.testing.mixer.check import check, is_masked, takes_context
from heedful.testing.subject import Subject


@check()
def input_errors(subject: Subject) -> None:
    """Wrong channels, wrong rank, a wrong mask: each is refused by a ValueError that names the argument."""
    mixer = subject.make()
    inputs = mixer.example_inputs()
    x = inputs["x"]
    space = subject.entry.kind in ("grid", "channel")
    channels = 1 if space else -1
    wider = torch.cat([x, x.narrow(channels, 0, 1)], dim=channels)
    wrong: dict[str, tuple[str, dict[str, Any]]] = {"one channel too many": ("x", {"x": wider})}
    if space:
        for axes in {0, 1, 2, 3, 4} - set(subject.entry.spatial):
            wrong[f"{axes} spatial axes"] = ("x", {"x": x.new_zeros(*x.shape[:2], *[3] * axes)})
    else:
        wrong["x without its batch axis"] = ("x", {"x": x[0]})
    if is_masked(subject.entry):
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        wrong["a mask for one token too few"] = ("mask", {"mask": mask[:, 1:]})
        wrong["a mask without its batch axis"] = ("mask", {"mask": mask[0]})
        wrong["a mask of numbers"] = ("mask", {"mask": mask.float()})
    if takes_context(subject.entry):
        context = x.new_zeros(len(x), 5, inputs["context"].shape[-1] if "context" in inputs else mixer.dim)
        mask = torch.ones(context.shape[:2], dtype=torch.bool)
        wrong["a context without its batch axis"] = ("context", {"context": context[0]})
        wrong["a context with one channel too few"] = ("context", {"context": context[..., 1:]})
        wrong["a context_mask for one token too few"] = (
            "context_mask",
            {"context": context, "context_mask": mask[:, 1:]},
        )
        wrong["a context_mask of numbers"] = (
            "context_mask",
            {"context": context, "context_mask": mask.float()},
        )
    elif subject.entry.kind == "sequence":
        wrong["a context, which is not declared"] = ("context", {"context": x})
    for what, (name, change) in wrong.items():
        _assert_refused(lambda change=change: mixer(**{**inputs, **change}), name, what)  # type: ignore[misc]


@check(lambda entry: entry.kind == "sequence")
def state_errors(subject: Subject) -> None:
    """An instance that cannot continue a sequence says so when asked for a state, or given one."""
    if not subject.entry.decode:
        mixer = subject.make()
        inputs = mixer.example_inputs()
        _assert_refused(lambda: mixer(**inputs, state=State()), "state", "a state, which is not declared")
    elif subject.entry.causal == "optional":
        mixer = subject.make(causal=False)
    else:
        return
    _assert_refused(lambda: mixer.init_state(2), None, "init_state of a mixer that does not decode")


@check()
def constructor_errors(subject: Subject) -> None:
    """dim=0, no heads and heads that do not fit are refused by a ValueError that names the argument."""
    if subject.cls is None:
        return
    _assert_refused(lambda: subject.build(dim=0), "dim", "dim=0")
    parameters, example = inspect.signature(subject.cls).parameters, subject.cls.example
    if "heads" in parameters:
        _assert_refused(lambda: subject.build(heads=0), "heads", "heads=0")
        own_width = "head_dim" in parameters and (
            "head_dim" in example or parameters["head_dim"].default is not None
        )
        if not own_width:
            heads = example["dim"] + 1
            _assert_refused(
                lambda: subject.build(heads=heads),
                "heads",
                f"heads={heads}, which does not divide {example['dim']}",
            )


def _assert_refused(call: Callable[[], object], name: str | None, what: str) -> None:
    wanted = "a ValueError" if name is None else f"a ValueError that names `{name}`"
    try:
        call()
    except ValueError as error:
        if name is not None and not re.search(rf"\b{name}\b", str(error)):
            raise AssertionError(f"expected {wanted} for {what}, got: {error}") from error
    except Exception as error:
        raise AssertionError(f"expected {wanted} for {what}, got {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"expected {wanted} for {what}, but it was accepted")
