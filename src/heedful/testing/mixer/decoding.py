"""A sequence in pieces is the sequence."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.testing.mixer.check import check, decodes
from heedful.testing.subject import Inputs, Subject, assert_close, rows, run, tensors_of, tokens

_SPLITS = ((0, 37), (0, 16, 17, 18, 19, 24, 32, 37), (0, 5, 6, 7, 22, 23, 36, 37), tuple(range(38)))


@check(decodes)
def pieces(subject: Subject) -> None:
    """Prefill, chunks of any length and single steps give what one pass gives."""
    mixer = subject.make_causal(dtype=torch.float64)
    inputs = mixer.example_inputs(length=37, dtype=torch.float64)
    whole = run(mixer, inputs)
    for split in _SPLITS:
        y, state = _continue(mixer, inputs, mixer.init_state(2), split)
        lengths = [stop - start for start, stop in pairwise(split)]
        shown = "37 single steps" if len(lengths) == 37 else f"pieces of {lengths}"
        assert_close(y, whole, f"{shown} to equal the whole")
        assert state.length == 37, f"expected the state to say that 37 tokens were seen, got {state.length}"


@check(decodes)
def pieces_padded(subject: Subject) -> None:
    """The same behind padding on the left, whose mask is given with the first piece."""
    mixer = subject.make_causal(dtype=torch.float64)
    inputs = mixer.example_inputs(length=23, dtype=torch.float64)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[1, :5] = False
    whole = run(mixer, {**inputs, "mask": mask})
    first, state = _step(mixer, {**tokens(inputs, 0, 11), "mask": mask[:, :11]}, mixer.init_state(2))
    rest, _ = _continue(mixer, inputs, state, (11, 12, 13, 20, 23))
    y = torch.cat([first, rest], dim=1)
    assert_close(y[mask], whole[mask], "pieces behind left padding to equal the whole")


@check(decodes)
def state_reorder(subject: Subject) -> None:
    """After state.reorder(index) the rows continue the sequences that index names."""
    mixer = subject.make_causal(dtype=torch.float64)
    inputs = mixer.example_inputs(batch=3, length=23, dtype=torch.float64)
    index = [2, 0, 0]
    with torch.no_grad():
        _, state = _step(mixer, tokens(inputs, 0, 11), mixer.init_state(3))
        expected, _ = _continue(mixer, rows(inputs, index), _replay(mixer, rows(inputs, index)), (11, 12, 23))
        y, _ = _continue(mixer, rows(inputs, index), state.reorder(torch.tensor(index)), (11, 12, 23))
    assert_close(y, expected, f"a state reordered to {index} to continue those sequences")


@check(decodes)
def state_unchanged(subject: Subject) -> None:
    """A call gives a new state and leaves the old one as it was, so that a sequence may branch."""
    mixer = subject.make_causal(dtype=torch.float64)
    inputs = mixer.example_inputs(length=23, dtype=torch.float64)
    with torch.no_grad():
        _, state = _step(mixer, tokens(inputs, 0, 11), mixer.init_state(2))
        kept = [t.clone() for t in tensors_of(state)]
        first, _ = _continue(mixer, inputs, state, (11, 12, 13, 23))
        same = all(torch.equal(a, b) for a, b in zip(kept, tensors_of(state), strict=True))
        assert same, "expected the old state not to change when the sequence continues"
        assert state.length == 11, "expected the old state's length not to change"
        second, _ = _continue(mixer, inputs, state, (11, 12, 13, 23))
    assert_close(second, first, "continuing twice from one state to give the same")


def _step(mixer: Mixer, inputs: Inputs, state: State) -> tuple[Tensor, State]:
    result = mixer(**inputs, state=state)
    assert isinstance(result, tuple), "expected forward with a state to give (y, state)"
    y, after = result
    assert isinstance(after, State), f"expected forward to give a State, got {type(after).__name__}"
    return y, after


def _continue(mixer: Mixer, inputs: Inputs, state: State, cuts: tuple[int, ...]) -> tuple[Tensor, State]:
    parts = []
    for start, stop in pairwise(cuts):
        y, state = _step(mixer, tokens(inputs, start, stop), state)
        parts.append(y)
    return torch.cat(parts, dim=1), state


def _replay(mixer: Mixer, inputs: Inputs) -> State:
    return _step(mixer, tokens(inputs, 0, 11), mixer.init_state(len(inputs["x"])))[1]
