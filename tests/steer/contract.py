"""What every intervention must hold to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from heedful.steer import Intervention


def check_intervention(
    make: Callable[[], Intervention],
    idle: Callable[[], Intervention],
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    *,
    tokens: int = 4,
) -> None:
    """It changes outputs inside, nothing outside; at strength 0 nothing at all; it stacks and generates.

    make, idle  give a fresh intervention that acts, and one of strength 0
    """
    with torch.no_grad():
        wanted = model(**inputs).logits
        how = {"max_new_tokens": tokens, "do_sample": False}
        written = model.generate(**inputs, **how)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        hooks, own = _hooks(model), model.config._attn_implementation

        with make()(model):
            inside = model(**inputs).logits
            again = model(**inputs).logits
            steered = model.generate(**inputs, **how)
        assert not torch.equal(inside, wanted), "expected other logits inside the context"
        assert inside.isfinite().all()
        assert torch.equal(again, inside), "expected the same logits for the same prompt"
        assert steered.shape == written.shape

        def untouched() -> None:
            assert _hooks(model) == hooks, "expected no hook to stay"
            assert model.config._attn_implementation == own
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
            assert torch.equal(model(**inputs).logits, wanted), "expected the model as it was"

        untouched()
        with pytest.raises(KeyError, match="amid"), make()(model):
            _fail_amid(model, inputs)
        untouched()
        with idle()(model):
            assert torch.equal(model(**inputs).logits, wanted), "expected strength 0 to change nothing"
            assert torch.equal(model.generate(**inputs, **how), written)
        untouched()
        with make()(model), idle()(model), make()(model):
            assert model(**inputs).logits.isfinite().all()
        untouched()
        one = make()
        with one(model):
            first = model(**inputs).logits
        with one(model):  # an intervention can be used again, and remembers nothing
            assert torch.equal(model(**inputs).logits, first)
        untouched()


def _hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def _fail_amid(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs)
    raise KeyError("amid")
