"""A mixer can be stored, sent and copied."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import chain

import torch

from heedful.mixers.mixer import Mixer
from heedful.testing.mixer.check import check
from heedful.testing.subject import Inputs, Subject, assert_same, functional, run, seeded


@check()
def state_dict(subject: Subject) -> None:
    """The state dict, stored and loaded strictly into another instance, brings the output along."""
    mixer, other = subject.make(), subject.make(seed=1)
    inputs = mixer.example_inputs()
    file = io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(run(other, inputs), run(mixer, inputs), "the same output after loading the state dict")


@check()
def pickling(subject: Subject) -> None:
    """A pickled mixer comes back with the same output, also amid training."""
    mixer, inputs = _trained(subject)
    other = pickle.loads(pickle.dumps(mixer))
    assert_same(run(other.eval(), inputs), run(mixer.eval(), inputs), "the same output after pickling")


@check()
def deepcopying(subject: Subject) -> None:
    """A deep copy, also amid training, has the same output and shares no parameter with the original."""
    mixer, inputs = _trained(subject)
    other = copy.deepcopy(mixer).eval()
    expected = run(mixer.eval(), inputs)
    assert_same(run(other, inputs), expected, "the same output from a deep copy")
    with torch.no_grad():
        for tensor in chain(other.parameters(), other.buffers()):
            tensor.zero_()
    assert_same(run(mixer, inputs), expected, "the original not to change with its deep copy")


def _trained(subject: Subject) -> tuple[Mixer, Inputs]:
    """A mixer after a training step, with all that such a step leaves on it."""
    mixer = subject.make(train=True)
    inputs = mixer.example_inputs()
    with seeded(0):
        loss = functional(run(mixer, inputs))
    if loss.requires_grad:
        loss.backward()
    return mixer, inputs
