from __future__ import annotations

import math
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

from heedful.ops import softmax_scan
from heedful.ops.softmax_scan import SoftmaxState, softmax_prefix_scan

FORMS = ("recurrent", "scan", "chunked", "auto")


def draw(n: int, *, scale: float = 1.0, hidden: bool = False, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(n)
    s = scale * torch.randn(2, 3, n, generator=generator, dtype=torch.float64)
    if hidden:
        s[torch.rand(2, 3, n, generator=generator) < 0.4] = -math.inf
        s[0, 0, : n // 2] = -math.inf
    v = torch.randn(2, 3, n, 5, generator=generator, dtype=torch.float64)
    return s.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()


def literal(s: Tensor, v: Tensor) -> Tensor:
    """A softmax of its own for every prefix, in float64."""
    s, v = s.double(), v.double()
    outs = []
    for k in range(s.shape[2]):
        shown = s[:, :, : k + 1]
        empty = (shown == -math.inf).all(-1, keepdim=True)
        weight = shown.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        outs.append(torch.einsum("bhj,bhje->bhe", weight, v[:, :, : k + 1]))
    return torch.stack(outs, dim=2)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 69])
@pytest.mark.parametrize("form", FORMS)
def test_equals_a_softmax_of_every_prefix(form, n, hidden):
    s, v = draw(n, hidden=hidden)
    out, expected = softmax_prefix_scan(s, v, form=form), literal(s, v)
    assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (s, v))
    assert all(g.isfinite().all() for g in grads)
    assert_close(grads, torch.autograd.grad((expected * weight).sum(), (s, v)))


@pytest.mark.parametrize("form", FORMS)
def test_great_scores_in_float32(form):
    s, v = draw(130, scale=1e4, dtype=torch.float32)
    for scores in (s, s.sort(dim=2).values, s.sort(dim=2, descending=True).values):
        out, expected = softmax_prefix_scan(scores, v, form=form), literal(scores, v)
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("form", ["scan", "chunked"])
@pytest.mark.parametrize("slope", [1e-4, 1e-1, -1e-1])
def test_64k_tokens_in_float32_stay_near_float64(form, slope):
    n = 65536
    s, v = (x.detach() for x in draw(n, dtype=torch.float32))
    s = s + slope * torch.arange(n)  # a maximum that rises for ever, or stays behind
    out = softmax_prefix_scan(s, v, form=form)
    exact = softmax_prefix_scan(s.double(), v.double(), form="chunked")
    assert (out - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_the_last_output_is_attention():
    query, key = (torch.randn(2, 3, m, 4, dtype=torch.float64) for m in (1, 33))
    value = torch.randn(2, 3, 33, 5, dtype=torch.float64)
    scores = (query @ key.mT)[:, :, 0] / 2
    out = softmax_prefix_scan(scores, value)
    assert_close(out[:, :, -1:], F.scaled_dot_product_attention(query, key, value))


@given(
    n=st.integers(1, 40),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(FORMS)), max_size=4),
    hidden=st.booleans(),
)
def test_cutting_a_sequence_changes_nothing(n, cuts, hidden):
    s, v = draw(n, hidden=hidden)
    whole = softmax_prefix_scan(s, v, form="recurrent")
    state, start, parts = None, 0, []
    for stop, form in [*sorted((min(cut, n), form) for cut, form in cuts), (n, "auto")]:
        with patch.object(softmax_scan, "SEGMENT", 4):  # segments are computed again in backward
            out, state = softmax_prefix_scan(
                s[:, :, start:stop], v[:, :, start:stop], state=state, form=form, return_state=True
            )
        parts.append(out)
        start = stop
    pieces = torch.cat(parts, dim=2)
    assert_close(pieces, whole)
    seen = s.detach()
    top = seen.amax(2)
    weight = torch.where(seen == -math.inf, 0.0, (seen - top[..., None]).exp())
    assert_close(state, SoftmaxState(top, weight.sum(-1), (weight[..., None] * v).sum(2)))
    projection = torch.randn(whole.shape, dtype=torch.float64)
    assert_close(
        torch.autograd.grad((pieces * projection).sum(), (s, v)),
        torch.autograd.grad((whole * projection).sum(), (s, v)),
    )


@pytest.mark.parametrize("form", ["recurrent", "scan", "chunked"])
def test_second_derivatives(form):
    s, v = draw(5)
    assert torch.autograd.gradgradcheck(lambda s, v: softmax_prefix_scan(s, v, form=form), (s, v))


@pytest.mark.parametrize("form", FORMS)
def test_sums_in_bfloat16_are_float32(form):
    s, v = draw(300, dtype=torch.bfloat16)
    out, state = softmax_prefix_scan(s, v, form=form, return_state=True)
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in state} == {torch.float32}
    expected = literal(s, v)
    assert ((out.double() - expected).abs() <= torch.finfo(torch.bfloat16).eps * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    s, v = torch.zeros(2, 3, 0), torch.zeros(2, 3, 0, 5)
    out, state = softmax_prefix_scan(s, v, form=form, return_state=True)
    assert out.shape == (2, 3, 0, 5)
    assert (state.maximum == -math.inf).all()
    assert not state.total.any() and not state.weighted.any()


@pytest.mark.compiled
def test_compiles_whole():
    s, v = draw(40)
    compiled = torch.compile(softmax_prefix_scan, backend="aot_eager", fullgraph=True)
    assert_close(compiled(s, v), softmax_prefix_scan(s, v))


@pytest.mark.door
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "fast"}, "form is 'fast', must be one of"),
        ({"scores": torch.zeros(3, 5)}, r"scores has shape \(3, 5\), must be \(b, h, n\)"),
        ({"value": torch.zeros(2, 3, 4, 4)}, r"value has shape .*, must be \(2, 3, 5, e\)"),
        (
            {"state": SoftmaxState(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))},
            r"state has shapes .*, must be \[\(2, 3\), \(2, 3\), \(2, 3, 7\)\]",
        ),
    ],
)
def test_errors(change, message):
    call = {"scores": torch.zeros(2, 3, 5), "value": torch.zeros(2, 3, 5, 7)}
    with pytest.raises(ValueError, match=message):
        softmax_prefix_scan(**{**call, **change})
