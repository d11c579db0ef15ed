"""What every check of a mixer works with: the mixer under check, its inputs, and how close is close."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from heedful.mixers.mixer import Mixer
from heedful.registry import Entry

Inputs = dict[str, Any]

# The largest accepted error of two computations of one thing, relative to the largest magnitude. Sums of
# some hundred terms and exponentials lose up to four digits of the unit roundoff (2^-53, 2^-24); a fault
# of mathematics is far above either.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# bfloat16 keeps 8 bits: each step errs by 2^-9 = 0.2 %, and a mixer is some tens of steps. Relative
# error in the Euclidean norm, because single elements may err by more.
BFLOAT16_TOLERANCE = 0.05
# Central differences with a step of 1e-6 err by about 1e-12 (their order) + 1e-10 (rounding).
DIFFERENCE_STEP, DIFFERENCE_TOLERANCE = 1e-6, 1e-6

LENGTHS = (1, 2, 3, 17, 37)  # one token, fewer than any block, and no multiple of a block
SIZES = {
    1: ((1,), (2,), (13,)),
    2: ((1, 1), (1, 7), (5, 3), (13, 9)),
    3: ((1, 1, 1), (1, 4, 2), (3, 5, 7)),
}


@dataclass(frozen=True)
class Subject:
    """The mixer under check: what it declares, and its class or the factory that builds it."""

    entry: Entry
    cls: type[Mixer] | None
    factory: Callable[[], Mixer] | None = None

    def make(
        self, *, dtype: torch.dtype = torch.float32, train: bool = False, seed: int = 0, **overrides: Any
    ) -> Mixer:
        """A small instance with no parameter at a special value, such as a gate that starts at zero."""
        with seeded(seed):
            mixer = self.build(**overrides)
            with torch.no_grad():
                for parameter in mixer.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
        return mixer.to(dtype).train(train)

    def build(self, **overrides: Any) -> Mixer:
        """The instance as it comes out of the constructor."""
        if self.cls is not None:
            return self.cls(**{**self.cls.example, **overrides})
        if overrides:
            raise SkipTest(f"a factory takes no arguments, so not {', '.join(overrides)}")
        assert self.factory is not None
        return self.factory()

    def make_causal(self, **how: Any) -> Mixer:
        """An instance that hides the future."""
        if self.cls is not None and self.entry.causal == "optional":
            how["causal"] = True
        mixer = self.make(**how)
        if not mixer.causal and self.cls is None:
            raise SkipTest("this factory builds a mixer that sees the future")
        assert mixer.causal, "expected the attribute `causal` to be True"
        return mixer

    def variants(self) -> list[dict[str, Any]]:
        """Constructor arguments for each declared form: causal and not."""
        if self.cls is not None and self.entry.causal == "optional":
            return [{"causal": False}, {"causal": True}]
        return [{}]

    def shapes(self) -> list[dict[str, Any]]:
        """Arguments of `example_inputs` for every awkward size."""
        if self.entry.kind in ("grid", "channel"):
            return [{"size": size} for axes in self.entry.spatial for size in SIZES[axes]]
        return [{"length": length} for length in LENGTHS]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from this seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def noise(like: Tensor, seed: int = 7) -> Tensor:
    """Standard normal numbers of the shape and dtype of `like`, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def run(mixer: Mixer, inputs: Inputs) -> Tensor:
    """The output of a forward without a state."""
    y = mixer(**inputs)
    assert isinstance(y, Tensor), f"expected a tensor from forward, got {type(y).__name__}"
    return y


def functional(y: Tensor) -> Tensor:
    """A random linear functional of the output: a loss that no symmetry of the mixer cancels."""
    return (y * noise(y)).sum()


def rows(inputs: Inputs, index: list[int]) -> Inputs:
    """The inputs of some batch rows; every tensor input has the batch as its first axis."""
    return {k: v[index] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def token_inputs(inputs: Inputs) -> list[str]:
    """Names of the inputs that go along with the tokens of x: shape (b, n, ...)."""
    lead = inputs["x"].shape[:2]
    return [
        k for k, v in inputs.items() if isinstance(v, Tensor) and "context" not in k and v.shape[:2] == lead
    ]


def tokens(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The inputs of tokens start to stop."""
    return {**inputs, **{k: inputs[k][:, start:stop] for k in token_inputs(inputs)}}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating inputs in another dtype."""
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors held by a state, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [t for f in dataclasses.fields(value) for t in tensors_of(getattr(value, f.name))]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_of(v)]
    return []


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude (absolute where that is 0)."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item() or 1.0
    return (actual - expected).abs().max().item() / scale


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal to the rounding of the expected dtype; `what` ends a sentence that begins with "expected"."""
    assert actual.shape == expected.shape, (
        f"expected {what}; shapes {actual.shape} and {expected.shape} differ"
    )
    tolerance = TOLERANCE[expected.dtype]
    found = error(actual, expected)
    assert found <= tolerance, f"expected {what}; relative error {found:.1e}, accepted {tolerance:.0e}"


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal to the last bit: the same computation twice."""
    assert torch.equal(actual, expected), f"expected {what}; relative error {error(actual, expected):.1e}"


def assert_finite(x: Tensor, what: str) -> None:
    assert bool(x.isfinite().all()), f"expected {what} to be finite, got NaN or infinity"


def assert_output(entry: Entry, x: Tensor, y: Tensor, what: str) -> None:
    """The shape, dtype and finiteness that the kind promises."""
    if entry.kind == "pool":
        fits, wanted = y.ndim == 2 and len(y) == len(x), f"({len(x)}, any)"
    elif entry.kind == "multivariate":
        fits, wanted = y.ndim >= 1 and len(y) == len(x), f"({len(x)}, ...)"
    else:
        fits, wanted = y.shape == x.shape, str(tuple(x.shape))
    assert fits, f"expected an output of shape {wanted} for {what}, got {tuple(y.shape)}"
    assert y.dtype == x.dtype, f"expected an output of dtype {x.dtype} for {what}, got {y.dtype}"
    assert_finite(y, f"the output for {what}")
