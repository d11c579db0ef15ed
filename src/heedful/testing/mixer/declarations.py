"""A mixer is what it declares."""

from __future__ import annotations

import inspect

import torch

from heedful.mixers.mixer import Mixer
from heedful.testing.mixer.check import CHECKS, check
from heedful.testing.subject import Subject

# Keywords of forward beside x, by kind: those it must take, and those it may.
KEYWORDS = {
    "sequence": ({"context", "mask", "context_mask", "positions", "state"}, set()),
    "grid": (set(), set()),
    "channel": (set(), set()),
    "pool": ({"mask"}, set()),
    "cross": ({"context"}, {"mask", "context_mask", "positions"}),
    "multivariate": (set(), {"mask", "positions"}),
}


@check()
def exemptions(subject: Subject) -> None:
    """Every exemption names a check that is for this mixer, and says why it does not hold."""
    for name, reason in subject.entry.exempt.items():
        assert name in CHECKS, f"expected exempt to name checks, {name!r} is none of {', '.join(CHECKS)}"
        assert CHECKS[name].applies(subject.entry), (
            f"expected no exemption from {name!r}, which is not run anyway"
        )
        assert name != "exemptions", "expected no exemption from having to give reasons"
        assert reason.strip(), f"expected a reason for the exemption from {name!r}"


@check()
def constructor_signature(subject: Subject) -> None:
    """`dim` is positional, all else keyword-only, with device=None and dtype=None as in torch."""
    if subject.cls is None:
        return
    parameters = inspect.signature(subject.cls).parameters
    first, *others = parameters.values()
    assert first.name == "dim", f"expected the first argument to be `dim`, got `{first.name}`"
    assert first.kind is first.POSITIONAL_OR_KEYWORD, "expected `dim` to be positional"
    for other in others:
        assert other.kind is other.KEYWORD_ONLY, f"expected `{other.name}` to be keyword-only"
    for name in ("device", "dtype"):
        assert name in parameters, f"expected the argument `{name}=None`"
        default = parameters[name].default
        assert default is None, f"expected the argument `{name}=None`, its default is {default!r}"


@check()
def forward_signature(subject: Subject) -> None:
    """Forward takes x and the keywords of its kind; what it takes beyond is declared as extra_inputs."""
    entry = subject.entry
    first, *others = inspect.signature(subject.build().forward).parameters.values()
    assert first.name == "x", f"expected forward's first argument to be `x`, got `{first.name}`"
    assert all(p.kind is p.KEYWORD_ONLY for p in others), "expected forward to take all but x by keyword"
    names = {p.name for p in others}
    must, may = KEYWORDS[entry.kind]
    assert must <= names, f"expected forward of kind {entry.kind!r} to take {sorted(must - names)}"
    extra = names - must - may
    assert extra == set(entry.extra_inputs), (
        f"expected extra_inputs to be {sorted(extra)}, which forward takes; "
        f"declared {sorted(entry.extra_inputs)}"
    )


@check()
def capabilities(subject: Subject) -> None:
    """What the entry says of the future, of decoding and of space agrees with itself and the instances."""
    entry, cls = subject.entry, subject.cls
    assert not entry.decode or entry.causal != "never", (
        "expected decode=True only where the future can be hidden"
    )
    assert bool(entry.spatial) == (entry.kind in ("grid", "channel")), (
        f"expected spatial for grid and channel mixers, and for them alone; "
        f"got {entry.spatial} for {entry.kind!r}"
    )
    mixer = subject.build()
    assert isinstance(mixer, Mixer), f"expected a Mixer, got {type(mixer).__name__}"
    if entry.causal != "optional":
        always = entry.causal == "always"
        assert mixer.causal == always, (
            f"expected the attribute `causal` to be {always}, as causal={entry.causal!r} says"
        )
    if cls is None:
        return
    takes_causal = "causal" in inspect.signature(cls).parameters
    assert takes_causal == (entry.causal == "optional"), (
        "expected an argument `causal` if and only if causal='optional' is declared; "
        f"declared {entry.causal!r}"
    )
    for overrides in subject.variants():
        if overrides:
            got = subject.build(**overrides).causal
            assert got == overrides["causal"], (
                f"expected the attribute `causal` to follow the argument, got {got}"
            )


@check()
def device_and_dtype(subject: Subject) -> None:
    """The constructor's device and dtype decide where every parameter lives and how it is kept."""
    if subject.cls is None:
        return
    for name, parameter in subject.build(device="meta").named_parameters():
        assert parameter.is_meta, f"expected parameter {name} on device='meta', got {parameter.device}"
    for name, parameter in subject.build(dtype=torch.float64).named_parameters():
        if parameter.is_floating_point():
            got = parameter.dtype
            assert got == torch.float64, f"expected parameter {name} to be float64, as dtype= says, got {got}"
