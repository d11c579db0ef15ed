"""A forward leaves nothing behind, and gives the same when asked the same."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from heedful.mixers.mixer import Mixer
from heedful.testing.mixer.check import check
from heedful.testing.subject import Inputs, Subject, assert_finite, assert_same, run, seeded


@check()
def determinism(subject: Subject) -> None:
    """Eval gives the same bits twice, also after other inputs; so does training from the same seed."""
    mixer = subject.make()
    inputs = mixer.example_inputs()
    first = run(mixer, inputs)
    for shape in subject.shapes()[-2:]:
        run(mixer, mixer.example_inputs(batch=1, seed=1, **shape))
    assert_same(run(mixer, inputs), first, "the same output in eval mode after other inputs")
    outputs = []
    for _ in range(2):
        mixer = subject.make(train=True)
        with seeded(3):
            outputs.append(run(mixer, inputs))
    assert_same(outputs[1], outputs[0], "the same output in training mode from the same seed")


@check()
def side_effects(subject: Subject) -> None:
    """A forward changes no input, no parameter and no global state; in eval mode no buffer either."""
    for train in (False, True):
        mode = "training" if train else "eval"
        mixer = subject.make(train=train)
        inputs = mixer.example_inputs()
        before = {name: tensor.detach().clone() for name, tensor in _held(mixer, inputs).items()}
        world = _world()
        with seeded(0) if train else contextlib.nullcontext():
            run(mixer, inputs)
        for name, value in _world().items():
            assert value == world[name], f"expected a forward in {mode} mode not to change {name}"
        for name, tensor in _held(mixer, inputs).items():
            if not (train and name.startswith("buffer")):
                same = torch.equal(tensor, before[name])
                assert same, f"expected a forward in {mode} mode not to change {name}"


@check()
def aux_losses(subject: Subject) -> None:
    """Auxiliary losses stand on the instance alone, as finite scalars by name."""
    mixer, other = subject.make(train=True), subject.make(train=True)
    with seeded(0):
        run(mixer, mixer.example_inputs())
    assert isinstance(mixer.aux_losses, dict), "expected aux_losses to be a dict"
    for name, loss in mixer.aux_losses.items():
        assert isinstance(loss, Tensor), f"expected aux_losses[{name!r}] to be a tensor"
        assert loss.ndim == 0, f"expected aux_losses[{name!r}] to be a scalar, got {tuple(loss.shape)}"
        assert_finite(loss, f"aux_losses[{name!r}]")
    assert mixer.aux_losses is not other.aux_losses, "expected each instance to have its own aux_losses"
    assert not other.aux_losses, "expected no aux_losses before a forward"


def _held(mixer: Mixer, inputs: Inputs) -> dict[str, Tensor]:
    return {
        **{f"input {n}": t for n, t in inputs.items() if isinstance(t, Tensor)},
        **{f"parameter {n}": t for n, t in mixer.named_parameters()},
        **{f"buffer {n}": t for n, t in mixer.named_buffers()},
    }


def _world() -> dict[str, object]:
    return {
        "torch's random state": torch.get_rng_state().tolist(),
        "the default dtype": torch.get_default_dtype(),
        "whether gradients are recorded": torch.is_grad_enabled(),
    }
