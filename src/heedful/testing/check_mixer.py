"""Prove what a mixer declares, in the manner of scikit-learn's estimator checks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from unittest import SkipTest

from heedful.mixers.mixer import Mixer
from heedful.registry import Entry, find
from heedful.testing.mixer import CHECKS, Check
from heedful.testing.subject import Subject, seeded

if TYPE_CHECKING:
    import pytest

Checked = str | type[Mixer] | Callable[[], Mixer]


@dataclass(frozen=True)
class BoundCheck:
    """A check of one mixer: call it to run it.

    Raises AssertionError with the check, the mixer and what was expected; unittest.SkipTest (which pytest
    shows as a skipped test) with the reason where the mixer is exempt or the check cannot be made.
    """

    check: Check
    entry: Entry
    mixer: Checked

    def __call__(self) -> None:
        if self.check.name in self.entry.exempt:
            raise SkipTest(self.entry.exempt[self.check.name])
        try:
            with seeded(0):
                self.check.prove(self._subject())
        except SkipTest:
            raise
        except Exception as error:
            said = str(error)
            if not isinstance(error, AssertionError):
                proves = (self.check.prove.__doc__ or "").split("\n")[0]
                said = f"expected no error ({proves}), got {type(error).__name__}: {error}"
            raise AssertionError(f"check {self.check.name!r} of {self.entry.object}: {said}") from error

    def _subject(self) -> Subject:
        if isinstance(self.mixer, str):
            return Subject(self.entry, self.entry.load())
        if isinstance(self.mixer, type):
            return Subject(self.entry, self.mixer)
        return Subject(self.entry, None, self.mixer)


def mixer_checks(mixer: Checked) -> Iterator[tuple[str, BoundCheck]]:
    """(name, callable) of every check that a mixer's kind and capabilities call for.

    mixer: a registered name (its file is loaded when a check runs), a class, which is built as
    `cls(**cls.example)`, or a factory without arguments, whose checks of the constructor do not apply.
    """
    entry = _entry(mixer)
    for name, check in CHECKS.items():
        if check.applies(entry):
            yield name, BoundCheck(check, entry, mixer)


def check_mixer(
    mixer: Checked, *, only: Collection[str] | None = None, skip: Collection[str] | None = None
) -> dict[str, str]:
    """Run every check of a mixer on small instances.

    mixer: as in `mixer_checks`. only, skip: names of the checks to run, or not to.
    Returns the checks by name: "passed", or the reason why a check was skipped. Raises AssertionError
    with the check, the mixer and what was expected, and ValueError if only or skip names no check.
    """
    for argument, names in (("only", only), ("skip", skip)):
        unknown = sorted(set(names or ()) - set(CHECKS))
        if unknown:
            raise ValueError(
                f"{argument} has {', '.join(map(repr, unknown))}, must name checks: {', '.join(CHECKS)}"
            )
    report = {}
    for name, check in mixer_checks(mixer):
        if (only is not None and name not in only) or (skip is not None and name in skip):
            continue
        try:
            check()
        except SkipTest as reason:
            report[name] = str(reason)
        else:
            report[name] = "passed"
    return report


def parametrize_mixers(
    *mixers: Checked, marks: Mapping[str, pytest.MarkDecorator] | None = None
) -> pytest.MarkDecorator:
    """Decorate a pytest function of one argument, `check`, with every check of every mixer:

        @parametrize_mixers("sqa", MyMixer)
        def test_mixer(check):
            check()

    mixers: as in `mixer_checks`. marks: a pytest mark for all tests of a check, by the check's name.
    """
    import pytest

    marks = marks or {}
    params: list[Any] = [
        pytest.param(check, id=f"{check.entry.name}-{name}", marks=marks.get(name, ()))
        for mixer in mixers
        for name, check in mixer_checks(mixer)
    ]
    return pytest.mark.parametrize("check", params)


def _entry(mixer: Checked) -> Entry:
    if isinstance(mixer, str):
        entry = find(mixer)
    elif isinstance(mixer, type):
        entry = cast(type[Mixer], mixer).entry
    else:
        with seeded(0):
            entry = mixer().entry
    if not entry.is_mixer:
        raise ValueError(f"mixer is {entry.name!r}, a {entry.kind}, must be one of the mixers")
    return entry
