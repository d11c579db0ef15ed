"""Nothing of the future is seen."""

from __future__ import annotations

import torch

from heedful.testing.mixer.check import check, is_causal
from heedful.testing.subject import (
    TOLERANCE,
    Inputs,
    Subject,
    assert_close,
    error,
    functional,
    noise,
    run,
    token_inputs,
)

_LENGTHS = (2, 37, 64, 65)  # whole blocks, one token more, and no multiple of a block
_LAST = (0, 1, 3, 7, 8, 15, 16, 30, 31, 32, 35, 62, 63)  # last token kept: block ends and their neighbours


@check(is_causal)
def future_outputs(subject: Subject) -> None:
    """New tokens after token t leave every output up to t as it was, for many t and lengths."""
    mixer = subject.make_causal(dtype=torch.float64)
    for length in _LENGTHS:
        inputs = mixer.example_inputs(length=length, dtype=torch.float64)
        before = run(mixer, inputs)
        for t in _LAST:
            if t < length - 1:
                after = run(mixer, _new_future(inputs, t))
                assert_close(
                    after[:, : t + 1],
                    before[:, : t + 1],
                    f"outputs up to token {t} of {length} not to see the future",
                )


@check(is_causal)
def future_gradients(subject: Subject) -> None:
    """Outputs up to token t have no gradient in any later token."""
    mixer = subject.make_causal(dtype=torch.float64)
    for length in _LENGTHS:
        inputs = mixer.example_inputs(length=length, dtype=torch.float64)
        x = inputs["x"].requires_grad_()
        y = run(mixer, inputs)
        for t in _LAST:
            if t < length - 1:
                (grad,) = torch.autograd.grad(
                    functional(y[:, : t + 1]), x, retain_graph=True, materialize_grads=True
                )
                found = (grad[:, t + 1 :].abs().max() / (grad.abs().max() + 1e-30)).item()
                assert found <= TOLERANCE[torch.float64], (
                    f"expected no gradient of outputs up to token {t} of {length} in later tokens, "
                    f"got {found:.1e} of the largest"
                )


@check(lambda entry: entry.kind == "sequence" and entry.causal == "optional")
def future_seen_if_not_causal(subject: Subject) -> None:
    """With causal=False some output does depend on a later token: the argument is no decoration."""
    mixer = subject.make(dtype=torch.float64, causal=False)
    inputs = mixer.example_inputs(length=37, dtype=torch.float64)
    before = run(mixer, inputs)
    changes = [
        error(run(mixer, _new_future(inputs, t))[:, : t + 1], before[:, : t + 1]) for t in _LAST if t < 36
    ]
    assert max(changes) > TOLERANCE[torch.float64], (
        "expected some output to see later tokens with causal=False"
    )


def _new_future(inputs: Inputs, t: int) -> Inputs:
    changed = dict(inputs)
    for name in token_inputs(inputs):
        if inputs[name].is_floating_point():
            value = inputs[name].detach().clone()
            value[:, t + 1 :] = 3 * noise(value[:, t + 1 :], seed=t)
            changed[name] = value
    return changed
