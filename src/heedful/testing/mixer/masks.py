"""Padding has no influence."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.testing.mixer.check import check, is_masked
from heedful.testing.subject import Subject, assert_close, assert_finite, functional, noise, run, tokens


@check(is_masked)
def padding(subject: Subject) -> None:
    """Outputs at valid tokens do not change with what masked tokens hold; a mask of all True is no mask."""
    for overrides in subject.variants():
        mixer = subject.make(dtype=torch.float64, **overrides)
        inputs = mixer.example_inputs(length=17, dtype=torch.float64)
        x = inputs["x"]
        everything = torch.ones(x.shape[:2], dtype=torch.bool)
        assert_close(
            run(mixer, {**inputs, "mask": everything}), run(mixer, inputs), "a mask of all True to be no mask"
        )
        for where, mask in _masks(x).items():
            y = run(mixer, {**inputs, "mask": mask})
            for size in (1.0, 1e3):
                other = torch.where(mask[..., None], x, size * noise(x))
                changed = run(mixer, {**inputs, "x": other, "mask": mask})
                what = f"values of masked tokens ({where}) to have no influence"
                if subject.entry.kind == "pool":
                    assert_close(changed, y, what)
                else:
                    assert_close(changed[mask], y[mask], what)


@check(lambda entry: is_masked(entry) and entry.causal != "always")
def padded_equals_shorter(subject: Subject) -> None:
    """Padding on the right, masked, gives what the shorter input gives."""
    overrides = subject.variants()[0]
    mixer = subject.make(dtype=torch.float64, **overrides)
    inputs = mixer.example_inputs(length=17, dtype=torch.float64)
    x = inputs["x"]
    for length in (1, 8, 13):
        mask = (torch.arange(17) < length).expand(x.shape[:2])
        padded = run(mixer, {**inputs, "mask": mask})
        if subject.entry.kind != "pool":
            padded = padded[:, :length]
        shorter = run(mixer, tokens(inputs, 0, length))
        assert_close(padded, shorter, f"{length} tokens padded to 17 to equal {length} tokens")


@check(is_masked)
def all_masked_row(subject: Subject) -> None:
    """A batch row that is padding alone gives finite outputs and gradients."""
    for overrides in subject.variants():
        mixer = subject.make(dtype=torch.float64, **overrides)
        inputs = mixer.example_inputs(length=17, dtype=torch.float64)
        mask = torch.ones(inputs["x"].shape[:2], dtype=torch.bool)
        mask[1] = False
        inputs["x"].requires_grad_()
        y = run(mixer, {**inputs, "mask": mask})
        assert_finite(y, "the output where a row is all masked")
        functional(y).backward()
        for name, leaf in [("x", inputs["x"]), *mixer.named_parameters()]:
            if leaf.grad is not None:
                assert_finite(leaf.grad, f"the gradient of {name} where a row is all masked")


def _masks(x: Tensor) -> dict[str, Tensor]:
    batch, length = x.shape[:2]
    place = torch.arange(length).expand(batch, length)
    cut = (length - 5 + torch.arange(batch))[:, None]
    scattered = noise(x[..., 0]) > -0.3
    scattered[:, length // 2] = True
    return {"right": place < cut, "left": place >= length - cut, "scattered": scattered}
