from __future__ import annotations

import math
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from heedful.ops import delta
from heedful.ops.delta import gated_delta_rule, l2_normalize
from heedful.ops.linear import linear_attention

FORMS = ("recurrent", "chunked", "auto")
Inputs = dict[str, Tensor]


def small_pieces(chunk: int = 8, segment: int = 16):
    """Chunks and segments so small that short sequences have many, all but one recomputed in backward."""
    return patch.multiple(delta, CHUNK=chunk, SEGMENT=segment)


def draw(
    n: int, *, b: int = 2, h: int = 3, d: int = 5, e: int = 4, dtype: torch.dtype = torch.float64
) -> Inputs:
    generator = torch.Generator().manual_seed(n)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    drawn = {
        "query": normal(b, h, n, d),
        "key": l2_normalize(normal(b, h, n, d)),
        "value": normal(b, h, n, e),
        "beta": normal(b, h, n).sigmoid(),
        "log_decay": -normal(b, h, n).abs() / 3,
        "state": normal(b, h, d, e),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}


def literal(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The transition of each token as a whole matrix, in float64, row by row and head by head."""
    q, k, v, beta, g, state = (inputs[name].double() for name in draw(1))
    b, h, n, d = q.shape
    outs, lasts = [], []
    for row in range(b):
        for head in range(h):
            S = state[row, head]
            for t in range(n):
                k_t = k[row, head, t]
                erase = torch.eye(d, dtype=torch.float64) - beta[row, head, t] * torch.outer(k_t, k_t)
                S = torch.exp(g[row, head, t]) * erase @ S
                S = S + beta[row, head, t] * torch.outer(k_t, v[row, head, t])
                outs.append(S.T @ q[row, head, t])
            lasts.append(S)
    return torch.stack(outs).reshape(b, h, n, -1), torch.stack(lasts).reshape(b, h, d, -1)


def gradients(results: tuple[Tensor, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of output and final state."""
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (r.double() * torch.randn(r.shape, generator=generator, dtype=torch.float64)).sum() for r in results
    )
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))


@pytest.mark.parametrize("n", [1, 16, 37])
@pytest.mark.parametrize("form", FORMS)
def test_equals_products_of_transition_matrices(form, n):
    inputs = draw(n)
    with small_pieces():
        results = gated_delta_rule(**inputs, form=form, return_state=True)
        grads = gradients(results, inputs)
    expected = literal(inputs)
    assert_close(results, expected)
    assert_close(grads, gradients(expected, inputs))


def test_several_full_segments_equal_the_recurrent_form():
    inputs = draw(2 * delta.SEGMENT + 3 * delta.CHUNK + 7, b=1, h=2)
    results = gated_delta_rule(**inputs, return_state=True)
    expected = gated_delta_rule(**inputs, form="recurrent", return_state=True)
    assert_close(results, expected)
    assert_close(gradients(results, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_derivatives_of_first_and_second_order(form):
    inputs = draw(5, b=1, h=1, d=2, e=2)

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(**dict(zip(inputs, given, strict=True)), form=form, return_state=True)

    with small_pieces(2, 4):
        assert torch.autograd.gradcheck(call, list(inputs.values()))
        assert torch.autograd.gradgradcheck(call, list(inputs.values()))


@given(
    n=st.integers(0, 40),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(FORMS)), max_size=4),
)
def test_cutting_a_sequence_changes_nothing(n, cuts):
    inputs = {name: x.detach() for name, x in draw(n).items()}
    whole, last = (
        gated_delta_rule(**inputs, form="recurrent", return_state=True)
        if n
        else (inputs["value"], inputs["state"])
    )
    state, start, parts = inputs.pop("state"), 0, []
    for stop, form in [*sorted((min(cut, n), form) for cut, form in cuts), (n, "auto")]:
        piece = {name: x[:, :, start:stop] for name, x in inputs.items()}
        with small_pieces(4, 8):
            out, state = gated_delta_rule(**piece, state=state, form=form, return_state=True)
        parts.append(out)
        start = stop
    assert_close(torch.cat(parts, dim=2), whole)
    assert_close(state, last)


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_keys_are_recalled(form):
    n = 6
    key = torch.linalg.qr(torch.randn(2, 3, n, n, dtype=torch.float64))[0]
    value = torch.randn(2, 3, n, 4, dtype=torch.float64)
    ones = torch.ones(2, 3, n, dtype=torch.float64)
    out, state = gated_delta_rule(key, key, value, ones, form=form, return_state=True)
    assert_close(out, value)
    recalled = gated_delta_rule(key * 0.5, key, value, ones * 0, state=state, form=form)
    assert_close(recalled, 0.5 * value)


def test_beta_zero_only_decays():
    inputs = draw(9)
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    out, state = gated_delta_rule(**inputs, return_state=True)
    kept = inputs["log_decay"].cumsum(-1).exp()
    assert_close(out, kept[..., None] * (inputs["query"] @ inputs["state"]))
    assert_close(state, kept[..., -1, None, None] * inputs["state"])


def test_orthogonal_keys_make_it_linear_attention():
    key = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
    inputs = {**draw(7, d=7), "key": key}
    beta = inputs["beta"][..., None]
    out = gated_delta_rule(**{**inputs, "state": None})
    assert_close(out, linear_attention(inputs["query"], key, beta * inputs["value"], inputs["log_decay"]))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_extreme_decays_in_float32(form):
    inputs = draw(70, b=1, h=2, dtype=torch.float32)
    extremes = torch.tensor([0.0, -1e4, -math.inf, -1e-6, -2.0])
    pick = torch.randint(5, (1, 2, 70), generator=torch.Generator().manual_seed(0))
    inputs["log_decay"] = extremes[pick].requires_grad_()
    results = gated_delta_rule(**inputs, form=form, return_state=True)
    grads = gradients(results, inputs)
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = literal(double)
    for ours, theirs in [
        *zip(results, expected, strict=True),
        *((grads[name], g) for name, g in gradients(expected, double).items()),
    ]:
        assert ours.isfinite().all()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [1e-6, 1e4])
def test_64k_tokens_stay_near_float64(span, dtype):
    inputs = {name: x.detach() for name, x in draw(65536, b=1, h=1, d=8, e=4, dtype=dtype).items()}
    inputs["log_decay"] = (inputs["log_decay"].float() * span).to(dtype)
    if span == 1e-6:
        inputs["key"][:, :, 1::2] = inputs["key"][:, :, ::2]  # every other token corrects the one before
    out = gated_delta_rule(**inputs)
    exact = gated_delta_rule(**{name: x.double() for name, x in inputs.items()})
    assert out.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_half_precision_sums_in_float32(form, dtype):
    inputs = draw(83, dtype=dtype, b=1, h=2)
    inputs["state"] = inputs["state"].detach().float().requires_grad_()
    out, state = gated_delta_rule(**inputs, form=form, return_state=True)
    expected, last = literal(inputs)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert_close(state, last.float(), rtol=1e-5, atol=1e-5)
    assert ((out.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()
    with torch.autocast("cpu", torch.bfloat16):
        _, under_autocast = gated_delta_rule(**inputs, form=form, return_state=True)
    assert torch.equal(under_autocast, state)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    inputs = draw(0)
    out, state = gated_delta_rule(**inputs, form=form, return_state=True)
    assert out.shape == (2, 3, 0, 4)
    assert torch.equal(state, inputs["state"])


def test_work_is_linear_in_the_length():
    def work(n: int) -> int:
        with FlopCounterMode(display=False) as counter:
            gated_delta_rule(**draw(n, b=1, h=1, dtype=torch.float32)).sum().backward()
        return counter.get_total_flops()

    two, four, six = (work(n * delta.SEGMENT) for n in (2, 4, 6))
    assert six - four == four - two  # the last chunk's state is not used, hence no proportionality


def test_backward_keeps_one_state_a_segment():
    segments = 5
    inputs = draw(segments * delta.SEGMENT, b=1, h=1)
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = gated_delta_rule(**inputs)
    assert 0 < sum(kept.values()) <= segments * inputs["state"].numel()
    out.sum().backward()


def test_l2_normalize():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]]) / torch.tensor(
        [[math.sqrt(25 + 1e-6)], [1.0], [math.sqrt(2e-6)]]
    )
    assert_close(l2_normalize(x), expected.double(), rtol=1e-6, atol=0.0)
    assert l2_normalize(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.compiled
def test_compiles_whole():
    inputs = draw(40)
    with small_pieces():
        compiled = torch.compile(gated_delta_rule, backend="aot_eager", fullgraph=True)
        results = compiled(**inputs, return_state=True)
        expected = gated_delta_rule(**inputs, return_state=True)
        assert_close(results, expected)
        assert_close(gradients(results, inputs), gradients(expected, inputs))


@pytest.mark.door
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "fast"}, r"form is 'fast', must be one of 'auto', 'recurrent', 'chunked'"),
        ({"query": torch.zeros(3, 5, 4)}, r"query has shape \(3, 5, 4\), must be \(b, h, n, d\)"),
        ({"key": torch.zeros(2, 3, 6, 4)}, r"key has shape \(2, 3, 6, 4\), must be \(2, 3, 5, 4\)"),
        ({"value": torch.zeros(2, 3, 4, 4)}, r"value has shape .*, must be \(2, 3, 5, e\)"),
        ({"beta": torch.zeros(2, 3)}, r"beta has shape \(2, 3\), must be \(2, 3, 5\)"),
        ({"log_decay": torch.zeros(3)}, r"log_decay has shape \(3,\), must be \(2, 3, 5\)"),
        ({"state": torch.zeros(2, 3, 4, 8)}, r"state has shape \(2, 3, 4, 8\), must be \(2, 3, 4, 7\)"),
    ],
)
def test_errors(change, message):
    call = {
        "query": torch.zeros(2, 3, 5, 4),
        "key": torch.zeros(2, 3, 5, 4),
        "value": torch.zeros(2, 3, 5, 7),
        "beta": torch.zeros(2, 3, 5),
    }
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**{**call, **change})
