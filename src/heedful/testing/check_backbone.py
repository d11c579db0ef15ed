"""What every image backbone must hold to, as functions that anyone can run on their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heedful.kept import forget
from heedful.models.backbone import Backbone

CLASSES = 3


def check_backbone(cls: type[Backbone]) -> None:
    """Run every check on `cls(**cls.example)`; an AssertionError names the first one that fails."""
    for name, check in CHECKS.items():
        try:
            check(cls)
        except Exception as wrong:
            raise AssertionError(f"check {name!r} of {cls.__name__}: {wrong}") from wrong


def make(cls: type[Backbone], *, dtype: torch.dtype = torch.float64, **overrides: Any) -> Backbone:
    """A small instance in eval mode, with no parameter or statistic at a special value."""
    torch.manual_seed(0)
    model = cls(**{**cls.example, "classes": CLASSES, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def image(model: Backbone, *, dtype: torch.dtype = torch.float64, **how: Any) -> Tensor:
    return model.example_inputs(dtype=dtype, **how)["x"]


def logits(cls: type[Backbone]) -> None:
    """An image gives finite logits; classes=0 the pooled vector; reset_classifier a head of any size."""
    model = make(cls)
    y = model(image(model))
    assert y.shape == (2, CLASSES), f"expected logits (2, {CLASSES}), got {tuple(y.shape)}"
    assert y.isfinite().all(), "expected finite logits"
    width = model.channels[-1]
    model.reset_classifier(7)
    assert model(image(model)).shape == (2, 7), "expected 7 logits after reset_classifier(7)"
    model.reset_classifier(0)
    y = model(image(model))
    assert y.ndim == 2, f"expected a vector of features from a model without a head, got {tuple(y.shape)}"
    assert make(cls, classes=0)(image(model)).shape == y.shape, f"expected classes=0 to give {tuple(y.shape)}"
    assert width > 0


def pyramid(cls: type[Backbone]) -> None:
    """features_only gives one map for each of `channels` and `reductions`, and builds nothing behind them."""
    model = make(cls, features_only=True)
    height, width = 2 * max(model.reductions), 3 * max(model.reductions)
    maps = model(image(model, size=(height, width)))
    assert isinstance(maps, list), f"expected a list of maps, got {type(maps).__name__}"
    shapes = [tuple(y.shape[1:]) for y in maps]
    wanted = [(c, height // r, width // r) for c, r in zip(model.channels, model.reductions, strict=True)]
    assert shapes == wanted, f"expected maps {wanted}, got {shapes}"
    sum(y.square().sum() for y in maps).backward()
    _all_reached(model)


def gradients(cls: type[Backbone]) -> None:
    """Every parameter of a classifier gets a finite gradient that is not zero."""
    model = make(cls).train()
    y = model(image(model, batch=3))
    y.square().sum().backward()
    _all_reached(model)


def training_after_inference(cls: type[Backbone]) -> None:
    """What a pass in torch.inference_mode keeps serves the training that follows."""
    model = make(cls)
    x = image(model)
    forget()
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()


def any_size(cls: type[Backbone]) -> None:
    """Images of odd sizes, smaller and larger than the example's, give finite logits."""
    model = make(cls)
    height, width = cls.example_size
    for size in ((height + 13, width - 9), (height - 5, width + 22)):
        y = model(image(model, size=size))
        assert y.shape == (2, CLASSES) and y.isfinite().all(), (
            f"expected finite logits for an image of {size}"
        )


def batch_rows(cls: type[Backbone]) -> None:
    """In eval mode an image's logits are those of the image alone."""
    model = make(cls)
    x = image(model, batch=3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-8, atol=1e-8)


def channels_in(cls: type[Backbone]) -> None:
    """in_channels is free, and a wrong image is refused by a ValueError that names x."""
    model = make(cls, in_channels=5)
    assert model(image(model)).shape == (2, CLASSES)
    told = _refusal(model, image(model)[:, :4])
    assert told.startswith("x has shape"), f"expected an error that names x, got: {told!r}"


def precision(cls: type[Backbone]) -> None:
    """float32 agrees with float64 to its rounding; in bfloat16 the logits are finite."""
    model = make(cls).requires_grad_(False)
    x = image(model, dtype=torch.float32)
    wanted = model(x.double())
    y = copy.deepcopy(model).float()(x)
    assert y.dtype == torch.float32
    error = float((y - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-3, f"expected float32 near float64, got a relative error of {error:.1e}"
    assert copy.deepcopy(model).bfloat16()(x.bfloat16()).isfinite().all(), (
        "expected finite logits in bfloat16"
    )


def state_dict(cls: type[Backbone]) -> None:
    """The state dict, loaded strictly into another instance, brings the logits along."""
    model = make(cls)
    torch.manual_seed(1)
    other = cls(**{**cls.example, "classes": CLASSES}).double().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(image(model)), model(image(model))), "expected the same logits"


def _refusal(model: Backbone, x: Tensor) -> str:
    try:
        model(x)
    except ValueError as told:
        return str(told)
    return ""


def _all_reached(model: Backbone) -> None:
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, f"expected a gradient that is not zero for {', '.join(dead)}"
    odd = [n for n, p in model.named_parameters() if not p.grad.isfinite().all()]  # type: ignore[union-attr]
    assert not odd, f"expected a finite gradient for {', '.join(odd)}"


CHECKS: dict[str, Callable[[type[Backbone]], None]] = {
    check.__name__: check
    for check in (
        logits,
        pyramid,
        gradients,
        training_after_inference,
        any_size,
        batch_rows,
        channels_in,
        precision,
        state_dict,
    )
}
