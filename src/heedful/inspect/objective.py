"""The number whose reasons the report gives: a logit, or how near an embedding is to its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.inspect.sample import Sample, Subject
from heedful.inspect.target import Parts, Target, image_parts, text_parts


def objective(subject: Subject, sample: Sample, grid: tuple[int, int] | None = None) -> Target:
    """The number to explain of one sample, as a function of its tokens or patches.

        classes       the logit of the likeliest one
        next tokens   the log-probability of the likeliest one after the text
        embeddings    (e - e_0) . (e_1 - e_0) / ||e_1 - e_0||^2, where e is the mean of the last hidden state,
                      e_1 that of the sample and e_0 that of a sample of which nothing is left: how much of
                      the way from nothing to its own embedding a sample goes, from 0 to 1

    grid  of images, in place of the sample's own

    Tokens that stand for no part of a text always stay. Raises ValueError where the model or the sample does
    not allow it.
    """
    parts = _parts(subject, sample, grid)
    fixed = sample.special if sample.grid is None else None
    if fixed is not None and bool(fixed.all()):
        raise ValueError(f"“{sample.title}” has no token but special ones")
    with torch.no_grad():
        output = parts.run(parts.x[None])
    score, name = _score(subject.model, parts, output, fixed)
    return parts.target(score, fixed=fixed, name=name)


def _parts(subject: Subject, sample: Sample, grid: tuple[int, int] | None) -> Parts:
    if sample.grid is None:
        return text_parts(subject.model, sample.inputs, tokens=sample.labels)
    (key,) = (key for key in ("x", "pixel_values") if key in sample.inputs)

    def run(pixels: Tensor) -> Any:
        return subject.run(replace(sample, inputs={**sample.inputs, key: pixels}))

    return image_parts(run, sample.inputs[key], grid or sample.grid)


def _score(
    model: Any, parts: Parts, output: Any, fixed: Tensor | None
) -> tuple[Callable[[Any], Tensor], str]:
    logits = _logits(output)
    if logits is not None and logits.ndim == 2:
        best = int(logits[0].argmax())
        called = getattr(getattr(model, "config", None), "id2label", None) or {}
        return lambda out: _logits(out)[:, best], f"the logit of class “{called.get(best, best)}”"
    if logits is not None and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        best = int(logits[0, -1].argmax())
        return (
            lambda out: _logits(out)[:, -1].log_softmax(-1)[:, best],
            f"the log-probability of the likeliest next token, number {best}",
        )
    left = parts.baseline
    if fixed is not None:
        left = torch.where(fixed[:, None].to(left.device), parts.x, left)
    with torch.no_grad():
        nothing = _embedding(parts.run(left[None]))
        way = _embedding(output) - nothing
    length = way.square().sum()
    if length == 0:
        raise ValueError(f"{type(model).__name__} puts out the same when all of the input is taken away")
    return (
        lambda out: ((_embedding(out) - nothing) * way).sum(-1) / length,
        "how far the output gets from that of an empty input (0) to its own (1)",
    )


def _logits(output: Any) -> Any:
    return output if isinstance(output, Tensor) and output.ndim == 2 else getattr(output, "logits", None)


def _embedding(output: Any) -> Tensor:
    """The mean of the last hidden state, or of a map, over its places."""
    hidden = _logits(output)
    if hidden is None:
        hidden = output if isinstance(output, Tensor) else output[0]
    if hidden.ndim == 4:
        return hidden.flatten(2).mean(-1)
    return hidden.mean(1) if hidden.ndim == 3 else hidden
