"""The checks themselves: right toy mixers pass all of them, and every check catches the fault it is for."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import SkipTest

import pytest
import torch
from torch import Tensor, nn

from heedful import registry
from heedful.checks import check_divides, check_map, check_mask, check_tokens
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.registry import Entry
from heedful.testing import check_mixer, mixer_checks, parametrize_mixers
from heedful.testing.mixer import CHECKS

DOCS = Path(__file__).parent.parent / "docs"
FAULTS: list[tuple[type[Mixer], str]] = []


def toy(kind: str, *caught_by: str, **declared: Any) -> Callable[[type], type]:
    """Give a toy its entry without entering it into the registry; list the checks that must catch it."""

    def decorate(cls: type) -> type:
        cls.entry = Entry(
            f"test-{cls.__name__}", kind, module=cls.__module__, object=cls.__name__, **declared
        )
        FAULTS.extend((cls, name) for name in caught_by)
        return cls

    return decorate


def sequence(*caught_by: str, **declared: Any) -> Callable[[type], type]:
    return toy("sequence", *caught_by, **{"causal": "always", "decode": True, **declared})


# -- right toys -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanState(State):
    total: Tensor | None = None
    count: Tensor | None = None


@sequence()
class RunningMean(Mixer):
    """y_t = W_o mean_{s <= t} W_v x_s, over the tokens that the mask shows."""

    example: ClassVar[dict[str, Any]] = {"dim": 8}
    state_class: type[MeanState] = MeanState

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim)
        self.value = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def init_state(self, batch: int) -> MeanState:
        weight = self.value.weight
        return self.state_class(0, weight.new_zeros(batch, self.dim), weight.new_zeros(batch, 1))

    def forward(self, x, *, context=None, mask=None, context_mask=None, positions=None, state=None):
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        if context is not None:
            raise ValueError("context is given, must be None: this mixer is of one sequence")
        return self.mix(x, mask, state)

    def mix(self, x, mask, state):
        value = self.value(x)
        weight = torch.ones_like(value[..., :1]) if mask is None else mask[..., None].to(value.dtype)
        total, count = (value * weight).cumsum(1), weight.cumsum(1)
        if state is not None:
            total, count = total + state.total[:, None], count + state.count[:, None]
        y = self.out((total / count.clamp(min=1)).to(x.dtype))
        if state is None:
            return y
        return y, self.state_class(state.length + x.shape[1], total[:, -1], count[:, -1])


class Plain(RunningMean):
    """Faults that need no state build on this: `change` acts on the output of the running mean."""

    def forward(self, x, *, context=None, mask=None, context_mask=None, positions=None, state=None):
        result = super().forward(x, context=context, mask=mask, state=state)
        return self.change(x, result) if state is None else (self.change(x, result[0]), result[1])

    def change(self, x, y):
        return y


@toy("sequence", causal="optional", cross=True)
class Mean(Mixer):
    """The mean of all tokens or of those so far; of a context, if there is one."""

    example: ClassVar[dict[str, Any]] = {"dim": 8, "heads": 2}

    def __init__(self, dim, *, heads=4, causal=False, device=None, dtype=None):
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.causal = causal
        self.value = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x, *, context=None, mask=None, context_mask=None, positions=None, state=None):
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        if state is not None:
            raise ValueError("state is given, must be None: this mixer does not decode")
        if context is not None:
            check_tokens("context", context, self.dim)
            check_mask("context_mask", context_mask, context.shape[0], context.shape[1])
        return self.mix(x, context, mask, context_mask, positions)

    def mix(self, x, context, mask, context_mask, positions):
        source, seen = (x, mask) if context is None else (context, context_mask)
        value = self.value(source)
        weight = torch.ones_like(value[..., :1]) if seen is None else seen[..., None].to(value.dtype)
        if self.causal and context is None:
            return ((value * weight).cumsum(1) / weight.cumsum(1).clamp(min=1)).to(x.dtype) + x
        return ((value * weight).sum(1, True) / weight.sum(1, True).clamp(min=1)).to(x.dtype) + x


@toy("grid", spatial=(1, 2, 3))
class GridMean(Mixer):
    """The mean over all positions, added to each."""

    example: ClassVar[dict[str, Any]] = {"dim": 4}

    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim)
        self.gain = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x):
        check_map("x", x, self.dim, self.entry.spatial)
        y = x + x.flatten(2).mean(2).view(*x.shape[:2], *[1] * (x.ndim - 2))
        return y * self.gain.view(-1, *[1] * (x.ndim - 2))


@toy("channel", spatial=(1, 2, 3))
class ChannelGate(GridMean):
    """x times the sigmoid of the channel means."""

    def forward(self, x):
        check_map("x", x, self.dim, self.entry.spatial)
        gate = (x.flatten(2).mean(2) * self.gain).sigmoid()
        return x * gate.view(*x.shape[:2], *[1] * (x.ndim - 2))


@toy("pool")
class MeanPool(Mixer):
    """The mean of the tokens that the mask shows."""

    example: ClassVar[dict[str, Any]] = {"dim": 8}

    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim)
        self.out = nn.Linear(dim, 3, device=device, dtype=dtype)

    def forward(self, x, *, mask=None):
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        weight = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        return self.out((x * weight).sum(1) / weight.sum(1).clamp(min=1)).to(x.dtype)


@toy("cross")
class ContextMean(Mixer):
    """x plus the mean of the context."""

    example: ClassVar[dict[str, Any]] = {"dim": 8}

    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim)
        self.value = nn.Linear(dim, dim, device=device, dtype=dtype)

    def example_inputs(self, *, batch=2, length=11, size=None, dtype=torch.float32, seed=0):
        inputs = super().example_inputs(batch=batch, length=length, dtype=dtype, seed=seed)
        context = super().example_inputs(batch=batch, length=length + 3, dtype=dtype, seed=seed + 1)["x"]
        return {**inputs, "context": context}

    def forward(self, x, *, context, context_mask=None):
        check_tokens("x", x, self.dim)
        check_tokens("context", context, self.dim)
        check_mask("context_mask", context_mask, context.shape[0], context.shape[1])
        value = self.value(context)
        weight = (
            torch.ones_like(value[..., :1])
            if context_mask is None
            else context_mask[..., None].to(value.dtype)
        )
        return x + ((value * weight).sum(1, True) / weight.sum(1, True).clamp(min=1)).to(x.dtype)


# -- the future -----------------------------------------------------------------------------------


@sequence("future_outputs", "future_gradients")
class SubtractsSequenceMean(Plain):
    def change(self, x, y):
        return y - y.mean(1, keepdim=True)


@sequence("future_outputs")
class RanksAmongAllTokens(Plain):
    def change(self, x, y):
        loud = x.detach().norm(dim=-1)
        return y * (loud >= loud.median(1, keepdim=True).values)[..., None]


@sequence("future_gradients")
class LeaksInBackwardAlone(Plain):
    def change(self, x, y):
        mean = x.mean(1, keepdim=True)
        return y + (mean - mean.detach())


@sequence("future_outputs")
class LeaksAcrossBlockEnds(Plain):
    """Token 15 of each block of 16 sees the token after it."""

    def change(self, x, y):
        later = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
        end = (torch.arange(x.shape[1]) % 16 == 15)[:, None]
        return y + later * end


@toy("sequence", "future_seen_if_not_causal", causal="optional", cross=True)
class AlwaysCausal(Mean):
    def mix(self, x, context, mask, context_mask, positions):
        self.causal, asked = True, self.causal
        y = super().mix(x, context, mask, context_mask, positions)
        self.causal = asked
        return y


# -- padding and context --------------------------------------------------------------------------


@sequence("padding")
class IgnoresMask(RunningMean):
    def mix(self, x, mask, state):
        return super().mix(x, None, state)


@toy("pool", "padding", "padded_equals_shorter")
class PoolIgnoresMask(MeanPool):
    def forward(self, x, *, mask=None):
        super().forward(x, mask=mask)
        return super().forward(x)


@toy("sequence", "padded_equals_shorter", causal="optional", cross=True)
class ScalesWithPaddedLength(Mean):
    def mix(self, x, context, mask, context_mask, positions):
        return super().mix(x, context, mask, context_mask, positions) / max(1, x.shape[1])


@toy("pool", "all_masked_row")
class DividesByNoTokens(MeanPool):
    def forward(self, x, *, mask=None):
        y = super().forward(x, mask=mask)
        return y if mask is None else y / mask.any(1, keepdim=True)


@toy("sequence", "context_mask", causal="optional", cross=True)
class IgnoresContextMask(Mean):
    def mix(self, x, context, mask, context_mask, positions):
        return super().mix(x, context, mask, None, positions)


@toy("sequence", "context_length", causal="optional", cross=True)
class CutsContext(Mean):
    def mix(self, x, context, mask, context_mask, positions):
        y = super().mix(x, context, mask, context_mask, positions)
        return y if context is None else y + self.value(context[:, : x.shape[1]])


# -- decoding -------------------------------------------------------------------------------------


@sequence("pieces")
class ForgetsOneToken(RunningMean):
    def mix(self, x, mask, state):
        if state is None:
            return super().mix(x, mask, state)
        y, after = super().mix(x, mask, state)
        return y, MeanState(after.length, after.total, after.count - float(state.length > 0))


@sequence("pieces_padded")
class IgnoresMaskWithState(RunningMean):
    def mix(self, x, mask, state):
        return super().mix(x, mask if state is None else None, state)


@dataclass(frozen=True)
class StubbornState(MeanState):
    def reorder(self, index: Tensor) -> StubbornState:
        return self


@dataclass(frozen=True)
class InverseState(MeanState):
    """Rows go where index says, not come from there: the inverse permutation."""

    def reorder(self, index: Tensor) -> InverseState:
        total, count = self.total.clone(), self.count.clone()
        total[index], count[index] = self.total, self.count
        return InverseState(self.length, total, count)


@sequence("state_reorder")
class ReordersNothing(RunningMean):
    state_class = StubbornState


@sequence("state_reorder")
class ReordersBackwards(RunningMean):
    state_class = InverseState


@sequence("state_unchanged")
class OverwritesState(RunningMean):
    def mix(self, x, mask, state):
        if state is None:
            return super().mix(x, mask, state)
        y, after = super().mix(x, mask, state)
        with torch.no_grad():
            state.total.copy_(after.total)
        return y, after


# -- shapes ---------------------------------------------------------------------------------------


@sequence("output")
class DropsToken(Plain):
    def change(self, x, y):
        return y[:, 1:]


@sequence("odd_sizes")
class PairsTokens(Plain):
    def change(self, x, y):
        return y.view(y.shape[0], -1, 2, y.shape[2]).flatten(1, 2) if y.shape[1] > 1 else y


@sequence("odd_sizes")
class NanAtLengthOne(Plain):
    def change(self, x, y):
        return y / (x.shape[1] - 1)


@toy("grid", "odd_sizes", spatial=(2,))
class NeedsEvenMaps(GridMean):
    def forward(self, x):
        return super().forward(nn.functional.pixel_unshuffle(x, 2).view(x.shape))


@sequence("empty_input")
class MaximumOfNoTokens(Plain):
    def change(self, x, y):
        return y + 0 * x.amax(1, keepdim=True)


@toy("pool", "empty_input")
class NanForNoTokens(MeanPool):
    def forward(self, x, *, mask=None):
        return super().forward(x, mask=mask) + 0 * x.mean()


@sequence("explicit_positions")
class CountsFromOne(RunningMean):
    def forward(self, x, *, context=None, mask=None, context_mask=None, positions=None, state=None):
        y = super().forward(x, context=context, mask=mask, state=state)
        start = torch.arange(1, x.shape[1] + 1) if positions is None else positions
        return y if state is not None else y + start.to(x.dtype)[..., None]


# -- gradients ------------------------------------------------------------------------------------


@sequence("parameter_gradients")
class DeadParameter(RunningMean):
    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))


@sequence("parameter_gradients")
class MultipliesByZero(DeadParameter):
    def mix(self, x, mask, state):
        return super().mix(x + 0 * self.unused, mask, state)


@sequence("input_gradient")
class DetachesInput(RunningMean):
    def mix(self, x, mask, state):
        return super().mix(x.detach(), mask, state)


@sequence("training_after_inference")
class KeepsAnInferenceTensor(RunningMean):
    def mix(self, x, mask, state):
        if not hasattr(self, "one"):
            self.one = x.new_ones(1)
        return super().mix(x * self.one, mask, state)


class _TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@sequence("gradient_values")
class WrongBackward(Plain):
    def change(self, x, y):
        return y + _TwiceTheGradient.apply(x)


# -- batch rows and precision ---------------------------------------------------------------------


@sequence("batch_rows")
class SubtractsBatchMean(Plain):
    def change(self, x, y):
        return y - y.mean((0, 1), keepdim=True) if len(y) else y


@sequence("float64")
class ComputesInFloat32(Plain):
    def change(self, x, y):
        return y.float()


@sequence("float64")
class DependsOnDtype(Plain):
    def change(self, x, y):
        return y + torch.finfo(y.dtype).eps ** 0.25


@sequence("bfloat16")
class MixesDtypes(Plain):
    def change(self, x, y):
        return y * torch.ones(self.dim) if y.dtype == torch.bfloat16 else y


@sequence("autocast")
class OverflowsUnderAutocast(Plain):
    def change(self, x, y):
        return y / (y.dtype != torch.bfloat16) if torch.is_autocast_enabled("cpu") else y


# -- effects --------------------------------------------------------------------------------------


@sequence("determinism", "side_effects")
class DrawsNumbers(Plain):
    def change(self, x, y):
        return y + torch.rand(())


@sequence("determinism")
class RemembersFirstInput(Plain):
    first = None

    def change(self, x, y):
        self.first = x.detach().mean() if self.first is None else 0.5 * self.first
        return y + self.first


@sequence("side_effects")
class CountsCalls(Plain):
    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)
        self.register_buffer("calls", torch.zeros((), device=device))

    def change(self, x, y):
        self.calls += 1
        return y


@sequence("side_effects")
class NormalisesWeights(Plain):
    def change(self, x, y):
        with torch.no_grad():
            self.out.weight.div_(self.out.weight.norm())
        return y


@sequence("side_effects")
class ScalesInput(Plain):
    def change(self, x, y):
        with torch.no_grad():
            x.mul_(0.5)
        return y


@sequence("aux_losses")
class SharesLosses(Plain):
    losses: ClassVar[dict[str, Tensor]] = {}

    def change(self, x, y):
        self.aux_losses = self.losses
        self.aux_losses["size"] = y.square().mean()
        return y

    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)
        self.aux_losses = self.losses


@sequence("aux_losses")
class LossPerToken(Plain):
    def change(self, x, y):
        self.aux_losses["size"] = y.square().mean(-1)
        return y


# -- copies ---------------------------------------------------------------------------------------


@sequence("state_dict")
class LosesTensor(Plain):
    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)
        self.shift = torch.randn(dim, device=device, dtype=dtype)

    def change(self, x, y):
        return y + self.shift.to(y.dtype)


@sequence("state_dict")
class LosesEntry(RunningMean):
    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k != "out.bias"}


@sequence("pickling")
class HoldsLambda(Plain):
    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)
        self.change = lambda x, y: y


@sequence("deepcopying")
class CopiesShallowly(RunningMean):
    def __deepcopy__(self, memo):
        other = type(self)(self.dim)
        other.value, other.out = self.value, self.out
        return other


@sequence("deepcopying")
class KeepsGraph(Plain):
    def change(self, x, y):
        self.last = y
        return y


# -- compilation ----------------------------------------------------------------------------------


@sequence("activation_checkpointing")
class DiffersWhenRecomputed(Plain):
    calls = 0

    def change(self, x, y):
        self.calls += 1
        return (y * self.calls).tanh()


@sequence("compiling")
class DiffersWhenCompiled(Plain):
    def change(self, x, y):
        return 2 * y if torch.compiler.is_compiling() else y


@sequence("exporting")
class BranchesOnData(Plain):
    def change(self, x, y):
        return y if x.sum() > 0 else -y


# -- declarations and errors ----------------------------------------------------------------------


@sequence("exemptions", exempt={"no_such_check": "for a reason"})
class ExemptFromUnknown(RunningMean): ...


@sequence("exemptions", exempt={"exporting": " "})
class ExemptWithoutReason(RunningMean): ...


@toy("pool", "exemptions", exempt={"pieces": "a pool does not decode"})
class ExemptFromForeign(MeanPool): ...


@sequence("constructor_signature")
class PositionalArguments(RunningMean):
    def __init__(self, dim, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)


@sequence("constructor_signature")
class NoDevice(RunningMean):
    def __init__(self, dim, *, dtype=None):
        super().__init__(dim, dtype=dtype)


@toy("pool", "forward_signature")
class UndeclaredInput(MeanPool):
    def forward(self, x, *, mask=None, weights=None):
        return super().forward(x, mask=mask)


@toy("pool", "forward_signature", extra_inputs=("weights",))
class DeclaresTooMuch(MeanPool): ...


@toy("pool", "forward_signature")
class TakesNoMask(MeanPool):
    def forward(self, x):
        return super().forward(x)


@sequence("capabilities", causal="never")
class DecodesTheFuture(RunningMean): ...


@sequence("capabilities", causal="optional")
class NoCausalArgument(RunningMean): ...


@toy("grid", "capabilities")
class NoSpace(GridMean): ...


@sequence("device_and_dtype")
class IgnoresDtype(RunningMean):
    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, device=device)


@sequence("device_and_dtype")
class IgnoresDevice(RunningMean):
    def __init__(self, dim, *, device=None, dtype=None):
        super().__init__(dim, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, dtype=dtype)


@sequence("input_errors")
class NoDoor(RunningMean):
    def forward(self, x, *, context=None, mask=None, context_mask=None, positions=None, state=None):
        return self.mix(x, mask, state)


@toy("pool", "input_errors")
class UnnamedError(MeanPool):
    def forward(self, x, *, mask=None):
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError("wrong shape")
        return super().forward(x, mask=mask)


@toy("sequence", "state_errors", causal="optional", cross=True)
class GivesUselessState(Mean):
    def init_state(self, batch):
        return State()


@toy("sequence", "constructor_errors", causal="optional", cross=True)
class AnyHeads(Mean):
    def __init__(self, dim, *, heads=4, causal=False, device=None, dtype=None):
        super().__init__(dim, heads=1, causal=causal, device=device, dtype=dtype)


# -- the tests ------------------------------------------------------------------------------------

RIGHT = [RunningMean, Mean, GridMean, ChannelGate, MeanPool, ContextMean]


@parametrize_mixers(*RIGHT, marks={"compiling": pytest.mark.compiled})
def test_right_toys_pass(check):
    check()


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        pytest.param(
            cls, name, id=f"{cls.__name__}-{name}", marks=[pytest.mark.compiled] * (name == "compiling")
        )
        for cls, name in FAULTS
    ],
)
def test_fault_is_caught(cls, name):
    with pytest.raises(AssertionError, match=f"^check '{name}' of {cls.__name__}: .*expected"):
        check_mixer(cls, only=[name])


def test_every_check_has_a_fault_planted():
    assert set(CHECKS) == {name for _, name in FAULTS}


def test_backward_leak_is_invisible_to_outputs():
    assert check_mixer(LeaksInBackwardAlone, only=["future_outputs"]) == {"future_outputs": "passed"}


def test_checks_follow_kind_and_capabilities():
    names = dict(mixer_checks(RunningMean))
    assert {"pieces", "future_outputs", "padding"} <= set(names)
    assert "context_mask" not in names
    assert not {"pieces", "future_outputs", "padding", "context_mask"} & set(dict(mixer_checks(GridMean)))
    assert {"padding", "padded_equals_shorter"} <= set(dict(mixer_checks(MeanPool)))


def test_only_and_skip():
    assert check_mixer(MeanPool, only=["output", "padding"], skip=["output"]) == {"padding": "passed"}
    with pytest.raises(ValueError, match="only has 'shape'"):
        check_mixer(MeanPool, only=["shape"])
    with pytest.raises(ValueError, match="skip has 'shape'"):
        check_mixer(MeanPool, skip=["shape"])


@sequence(exempt={"batch_rows": "the published form centres over the batch"})
class ExemptToy(SubtractsBatchMean): ...


def test_exempt_check_is_skipped_with_its_reason():
    reason = "the published form centres over the batch"
    assert check_mixer(ExemptToy, only=["batch_rows", "exemptions"]) == {
        "exemptions": "passed",
        "batch_rows": reason,
    }
    with pytest.raises(SkipTest, match=reason):
        dict(mixer_checks(ExemptToy))["batch_rows"]()


@pytest.mark.compiled
def test_factory():
    report = check_mixer(lambda: MeanPool(6))
    assert set(report.values()) == {"passed"}
    with pytest.raises(AssertionError, match="check 'padding' of PoolIgnoresMask"):
        check_mixer(lambda: PoolIgnoresMask(6), only=["padding"])
    assert "sees the future" in check_mixer(lambda: Mean(8), only=["future_outputs"])["future_outputs"]
    only = ["future_outputs"]
    assert check_mixer(lambda: Mean(8, causal=True), only=only) == {"future_outputs": "passed"}


def test_by_registered_name(monkeypatch):
    monkeypatch.setattr(registry, "_runtime", {})
    monkeypatch.setattr(registry, "_runtime_objects", {})

    @registry.register("test-registered-pool", kind="pool")
    class Registered(MeanPool): ...

    assert check_mixer("test-registered-pool", only=["output"]) == {"output": "passed"}
    with pytest.raises(ValueError, match="no mechanism is called"):
        check_mixer("test-no-such-mixer")


def test_checks_leave_the_random_state_alone():
    before = torch.get_rng_state()
    check_mixer(MeanPool, skip=["compiling"])
    assert torch.equal(torch.get_rng_state(), before)


# -- the documentation ----------------------------------------------------------------------------


def test_documentation_lists_every_check():
    text = (DOCS / "adding-a-mechanism.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.M))
    assert rows == {c.name: (c.prove.__doc__ or "").split("\n")[0] for c in CHECKS.values()}


@pytest.mark.compiled
def test_example_in_the_documentation(tmp_path, monkeypatch):
    text = (DOCS / "adding-a-mechanism.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, flags=re.S))
    assert list(files) == ["key_scored_attention.py", "test_key_scored_attention.py"]
    monkeypatch.setattr(registry, "_runtime", {})
    monkeypatch.setattr(registry, "_runtime_objects", {})
    modules = [_load(tmp_path / name, source, monkeypatch) for name, source in files.items()]
    tests = {name: test for name, test in vars(modules[1]).items() if name.startswith("test_")}
    assert len(tests) == 3
    for test in tests.values():
        test()
    report = check_mixer(modules[0].KeyScoredAttention)
    assert set(report.values()) == {"passed"}
    assert len(report) == len(CHECKS)  # the example shows every capability that a sequence mixer can have


def _load(path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module
