"""The catalogue tells the truth: papers and the registry fit, calls run, pictures show what there is."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from heedful import catalogue
from heedful.catalogue import Became, Paper, bibtex
from heedful.catalogue.page import page
from heedful.catalogue.picture import draw, influence
from heedful.registry import index

ROOT = Path(__file__).parent.parent
NAMES = sorted(index())


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_stands_in_the_catalogue(name):
    entry = index()[name]
    assert entry.summary
    assert (ROOT / "src" / entry.path).is_file()
    if entry.paper is None:
        assert entry.kind == "op"  # a tool that many papers share
        return
    assert name in [b.name for b in catalogue.paper(entry.paper).became]


@pytest.mark.parametrize("key", sorted(catalogue.papers()))
def test_what_a_paper_became_is_registered(key):
    paper = catalogue.paper(key)
    for became in paper.became:
        assert became.name in index(), f"{key} became {became.name!r}, which is not registered"
        assert became.what
    assert not paper.became or paper.proof
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", paper.arxiv)
    assert 1980 < paper.year < 2100
    for proof in paper.proof:
        for file in re.findall(r"tests/[\w/-]+\.py", proof):
            assert (ROOT / file).is_file(), f"{key} names {file}, which is not there"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole_and_its_call_runs(name):
    told = page(index()[name])
    assert told["doc"].startswith(told["summary"])
    assert told["what"] or told["paper"] is None
    scope: dict = {}
    exec(told["call"], scope)
    if index()[name].is_mixer or index()[name].kind == "pattern":
        assert torch.isfinite(scope["y"] if isinstance(scope["y"], torch.Tensor) else scope["y"][0]).all()


def test_bibtex():
    made = Paper(
        "some-card",
        "Attention & All of 100% {X}",
        2017,
        "mechanism",
        ("Vaswani, Ashish", "Müller, Jörg"),
        "NeurIPS",
        "1706.03762",
    )
    assert bibtex(made) == (
        "@misc{vaswani2017,\n"
        "  title = {{Attention \\& All of 100\\% {X}}},\n"
        "  author = {Vaswani, Ashish and Müller, Jörg},\n"
        "  year = {2017},\n"
        "  howpublished = {NeurIPS},\n"
        "  eprint = {1706.03762},\n"
        "  archiveprefix = {arXiv}\n}"
    )
    assert bibtex(Paper("some-card", "T", 2020, "mechanism")).startswith("@misc{some-card,\n")
    assert "{muller2020," in bibtex(Paper("k", "T", 2020, "mechanism", ("Müller, Jörg",)))


def test_reading_a_paper(tmp_path):
    path = tmp_path / "a-card.toml"
    good = 'title = "T"\nyear = 2020\nkind = "mechanism"\n'
    path.write_text(good + 'limits = ["one"]\n[[became]]\nname = "a"\nwhat = "all of it"\n')
    assert Paper.read(path) == Paper(
        "a-card", "T", 2020, "mechanism", became=(Became("a", "all of it"),), limits=("one",)
    )
    path.write_text(good + 'colour = "red"\n')
    with pytest.raises(ValueError, match=r"a-card.toml has fields \['colour'\]"):
        Paper.read(path)
    path.write_text('title = "T"\n')
    with pytest.raises(ValueError, match=r"a-card.toml lacks year, kind"):
        Paper.read(path)
    path.write_text(good + 'proof = "tests"\n')
    with pytest.raises(ValueError, match=r"proof in a-card\.toml is 'tests', must be a list"):
        Paper.read(path)


def test_finding():
    assert catalogue.find("eca").name == "eca"
    assert catalogue.find("dense").name == "self-attention"
    assert "eca-ns" in catalogue.also(catalogue.find("eca"))
    assert "dense" in catalogue.also(catalogue.find("self-attention"))
    assert "gna" in catalogue.also(catalogue.find("faster-neighborhood-attention"))
    assert page(catalogue.find("gna"), "gna")["source"]["key"] == "gna"
    for key in {e.paper for e in index().values() if e.paper is not None}:
        assert catalogue.find(key) in catalogue.of_paper(key)
    with pytest.raises(ValueError, match="nothing is called 'ecca'; did you mean 'eca'"):
        catalogue.find("ecca")
    with pytest.raises(ValueError, match="the catalogue has no paper 'ecca'"):
        catalogue.paper("ecca")
    with pytest.raises(ValueError, match="tag is 'no-such', must be one of"):
        catalogue.entries(tag="no-such")
    assert {e.kind for e in catalogue.entries(kind="channel")} == {"channel"}


def test_influence_is_the_norm_of_the_jacobian():
    for name, shape in (("self-attention", (1, 5, 16)), ("eca", (1, 16, 2, 3))):
        entry = index()[name]
        torch.manual_seed(0)
        mixer = entry.load()(**entry.load().example).double().eval()
        x = torch.randn(shape, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(mixer, x)
        if entry.kind == "channel":  # (1, c, h, w, 1, c, h, w)
            wanted = jacobian.square().sum((0, 2, 3, 4, 6, 7)).sqrt()
        else:  # (1, n, c, 1, n, c)
            wanted = jacobian.square().sum((0, 2, 3, 5)).sqrt()
        torch.testing.assert_close(influence(mixer, {"x": x}), wanted)


@pytest.mark.parametrize("name", ["eca", "self-attention", "ggem", "neighborhood"])
def test_pictures(name, tmp_path):
    file = tmp_path / "a.png"
    draw(index()[name], file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_no_picture(tmp_path):
    with pytest.raises(ValueError, match="'flashbias' is a bias and has no picture"):
        draw(index()["flashbias"], tmp_path / "a.png")
    with (
        pytest.raises(ValueError, match=r"[Ff]ormat"),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        draw(index()["eca"], tmp_path / "a.nothing")
