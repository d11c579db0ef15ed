"""The costs of head designs: caches as their formulas say, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heedful.bench.heads import DESIGNS, HEADER, Row, build, cache, markdown, multiply_adds
from heedful.models.count import parameters
from heedful.registry import index

PAGE = Path(__file__).parent.parent / "docs" / "heads.md"
BY_LABEL = {design.label: design for design in DESIGNS}


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.label)
def test_page_tells_what_is_measured(design):
    """Cache and parameters; multiply-adds of those that route depend on the data."""
    kept = cache(design)  # raises where the formula is wrong
    token, once = (None, None) if kept is None else kept
    measured = markdown(Row(design, token, once, 0.0, parameters(build(design, torch.float32))))
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    (shown,) = [line for line in lines if line.startswith(f"| {design.label} |")]
    *shown_columns, _, shown_parameters, _ = shown.split("|")
    *columns, _, parameter_column, _ = measured.split("|")
    assert (shown_columns, shown_parameters) == (columns, parameter_column)


def test_every_head_design_that_decodes_is_shown():
    wanted = {e.name for e in index().values() if e.module.startswith("heedful.mixers.heads.") and e.decode}
    assert wanted <= {design.name for design in DESIGNS}


def test_page_has_the_header():
    assert "\n".join(HEADER) in PAGE.read_text(encoding="utf-8")


def test_multiply_adds():
    """Projections and two products with 1024 tokens; of latents in the absorbed form."""
    assert multiply_adds(BY_LABEL["multi-head"]) == 4 * 512**2 + 2 * 512 * 1024
    query, latent, absorb = 512 * 256 + 256 * 8 * 96, 512 * 160, 8 * (64 + 64) * 128
    attention = 8 * 1024 * ((128 + 32) + 128)
    expected = query + latent + absorb + attention + 512**2
    assert multiply_adds(BY_LABEL["latent, ranks 256 and 128, 32 rotary channels"]) == expected


def test_a_wrong_formula_is_told(monkeypatch):
    wrong = type(DESIGNS[0])("wrong", "self-attention", {"causal": True}, "heads * head_dim")
    with pytest.raises(ValueError, match="grows by 2048 bytes a token, must grow by 1024"):
        cache(wrong)
