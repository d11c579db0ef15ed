"""Names to mechanisms: the index, outside classes, errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import heedful
from heedful import models, registry
from heedful.mixers.mixer import Mixer
from heedful.registry import Entry, find, index, list_mixers


@pytest.fixture
def outside():
    """Registrations of this test are forgotten afterwards."""
    before = dict(registry._runtime)
    yield
    registry._runtime.clear()
    registry._runtime.update(before)


def test_listing_loads_neither_torch_nor_a_mechanism():
    code = (
        "import sys, heedful, heedful.catalogue; names = heedful.list_mixers(); heedful.catalogue.papers();"
        "heavy = [m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules];"
        "loaded = [m for m in sys.modules if m.startswith(('heedful.mixers', 'heedful.ops'))];"
        "assert names and not heavy and not loaded, (len(names), heavy, loaded)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(index()))
def test_the_declaration_in_the_text_is_the_one_at_run_time(name):
    told = index()[name]
    made = told.load()
    at_run_time = made.entry
    assert (made.__name__, made.__module__) == (told.object, told.module)
    configured = {n.name for n in models.list() if n.family == name}  # the text adds them to the aliases
    assert {*told.aliases} == {*at_run_time.aliases} | configured - {name}
    for field in ("name", "kind", "paper", "tags", "causal", "cross", "decode", "spatial"):
        assert getattr(at_run_time, field) == getattr(told, field), field
    assert (at_run_time.summary, at_run_time.exempt) == (told.summary, told.exempt)


def test_names_and_aliases_are_unique():
    names = [n for e in index().values() for n in (e.name, *e.aliases)]
    assert len(names) == len(set(names))


def test_create_by_name_and_alias():
    assert type(heedful.create("eca", 8)).__name__ == "ECA"
    assert find("dense") is find("self-attention")


def test_classes_from_outside_enter_the_index(outside):
    @heedful.register("twice", kind="sequence", tags=("toy",), aliases=("double",), exempt={"x": "a toy"})
    class Twice(Mixer):
        """Doubles its input.

        y = 2 x
        """

        def forward(self, x):
            return 2 * x

    assert Twice.entry.summary == "Doubles its input."
    assert "twice" in list_mixers(tag="toy")
    assert isinstance(heedful.create("double", 4), Twice)
    assert torch.equal(heedful.create("twice", 4)(torch.ones(1, 2, 4)), torch.full((1, 2, 4), 2.0))
    with pytest.raises(ValueError, match="name 'eca' is taken by heedful"):
        heedful.register("eca", kind="channel")(type("Mine", (Mixer,), {"__module__": "elsewhere"}))


def test_filters():
    assert "eca" in list_mixers(kind="channel")
    assert set(list_mixers(paper="eca")) >= {"eca", "eca-ns"}
    assert "eca" not in list_mixers(kind="sequence")
    assert all("linear" in index()[n].tags for n in list_mixers(tag="linear"))


def test_errors():
    with pytest.raises(ValueError, match="no mechanism is called 'ecaa'; did you mean 'eca'"):
        heedful.create("ecaa", 8)
    with pytest.raises(ValueError, match="`heedful list` shows"):
        find("zzzzzzzz")
    with pytest.raises(ValueError, match="'flashbias' is a bias, not a mixer"):
        heedful.create("flashbias")
    with pytest.raises(ValueError, match="kind of 'a' is 'thing'"):
        Entry("a", "thing")
    with pytest.raises(ValueError, match="causal of 'a' is 'yes'"):
        Entry("a", "sequence", causal="yes")
