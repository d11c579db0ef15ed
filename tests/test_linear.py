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

from heedful.ops import linear
from heedful.ops.linear import decay_slopes, linear_attention

DECAYS = (None, "head", "token", "channel")
CAUSAL_FORMS = ("recurrent", "chunked", "auto")


def small_pieces(chunk: int = 8, segment: int = 16):
    """Chunks and segments so small that short sequences have many, all but one recomputed in backward."""
    return patch.multiple(linear, CHUNK=chunk, SEGMENT=segment)


def draw(
    n: int,
    decay: str | None,
    *,
    b: int = 2,
    h: int = 3,
    d: int = 5,
    e: int = 4,
    features: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(n)
    shape = {None: (0,), "head": (h,), "token": (b, h, n), "channel": (b, h, n, d)}[decay]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    q, k, v = normal(b, h, n, d), normal(b, h, n, d), normal(b, h, n, e)
    S = normal(b, h, d, e + features)
    if features:
        q, k, S = q.abs(), k.abs(), S.abs()
    drawn = {"query": q, "key": k, "value": v, "log_decay": -normal(*shape).abs() / 3, "state": S}
    return {
        name: None if name == "log_decay" and decay is None else x.to(dtype).requires_grad_()
        for name, x in drawn.items()
    }


def literal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    normalize: bool = False,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All pairs, in float64: o_i = sum_(j <= i) sum_c q_ic k_jc exp(g_(j+1)c + .. + g_ic) v_j."""
    q, k, v = query.double(), key.double(), value.double()
    b, h, n, d = q.shape
    g = torch.zeros(h) if log_decay is None else log_decay
    g = g.double().reshape(*g.shape, *[1] * (4 - g.ndim)) if g.ndim != 1 else g.double()[None, :, None, None]
    g = g.expand(b, h, n, d)
    if normalize:
        v = torch.cat([v, torch.ones(b, h, n, 1).double()], dim=-1)
    S = torch.zeros(b, h, d, v.shape[-1]).double() if state is None else state.double()
    outs, last = [], S
    for i in range(n):
        later = torch.cat([g[:, :, 1 : i + 1], torch.zeros(b, h, 1, d)], dim=2).flip(2).cumsum(2).flip(2)
        kept, seen = k[:, :, : i + 1] * later.exp(), v[:, :, : i + 1]
        old = g[:, :, : i + 1].sum(2).exp()[..., None] * S
        scores = torch.einsum("bhd,bhjd->bhj", q[:, :, i], kept)
        outs.append(
            torch.einsum("bhj,bhje->bhe", scores, seen) + torch.einsum("bhd,bhde->bhe", q[:, :, i], old)
        )
        last = old + torch.einsum("bhjd,bhje->bhde", kept, seen)
    out = torch.stack(outs, dim=2)
    return (out[..., :-1] / out[..., -1:] if normalize else out), last


def gradients(results: tuple[Tensor, Tensor], inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of output and final state."""
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (r.double() * torch.randn(r.shape, generator=generator, dtype=torch.float64)).sum() for r in results
    )
    given = {name: x for name, x in inputs.items() if x is not None}
    return dict(zip(given, torch.autograd.grad(total, list(given.values())), strict=True))


@pytest.mark.parametrize("n", [1, 16, 37])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", CAUSAL_FORMS)
def test_equals_the_literal_sum(form, decay, n):
    inputs = draw(n, decay)
    with small_pieces():
        results = linear_attention(**inputs, form=form, return_state=True)
        grads = gradients(results, inputs)
    expected = literal(**inputs)
    assert_close(results, expected)
    assert_close(grads, gradients(expected, inputs))


@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_of_64_equal_the_literal_sum(decay):
    inputs = draw(83, decay, b=1, h=2)
    results = linear_attention(**inputs, return_state=True)
    expected = literal(**inputs)
    assert_close(results, expected)
    assert_close(gradients(results, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("decay", DECAYS)
def test_several_full_segments_equal_the_recurrent_form(decay):
    n = 2 * linear.SEGMENT + 3 * linear.CHUNK + 7
    inputs = draw(n, decay, b=1, h=2)
    results = linear_attention(**inputs, return_state=True)
    expected = linear_attention(**inputs, form="recurrent", return_state=True)
    assert_close(results, expected)
    assert_close(gradients(results, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_derivatives_of_first_and_second_order(form, decay):
    inputs = draw(5, decay, b=1, h=1, d=2, e=2)
    names = [name for name, x in inputs.items() if x is not None]

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(names, given, strict=True)), form=form, return_state=True)

    given = [inputs[name] for name in names]
    with small_pieces(2, 4):
        assert torch.autograd.gradcheck(call, given)
        assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", CAUSAL_FORMS)
def test_normalised_rows_are_weighted_means(form, decay):
    inputs = draw(21, decay, features=True)
    with small_pieces():
        results = linear_attention(**inputs, normalize=True, form=form, return_state=True)
        grads = gradients(results, inputs)
        ones = linear_attention(
            **{**inputs, "value": torch.ones_like(inputs["value"]), "state": None}, normalize=True, form=form
        )
    expected = literal(**inputs, normalize=True)
    assert_close(results, expected)
    assert_close(grads, gradients(expected, inputs))
    assert_close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_normalised_rows_that_saw_nothing_are_zeros(form):
    q, k, v = torch.rand(3, 1, 2, 9, 4).unbind(0)
    k[:, :, :5] = 0
    k.requires_grad_()
    out = linear_attention(q, k, v, normalize=True, form=form)
    assert torch.equal(out[:, :, :5], torch.zeros(1, 2, 5, 4))
    assert_close(out[:, :, 5], v[:, :, 5])
    (grad,) = torch.autograd.grad(out.sum(), k)
    assert grad.isfinite().all()
    assert torch.equal(linear_attention(q, k * 0, v, normalize=True, causal=False), torch.zeros(1, 2, 9, 4))


@given(
    n=st.integers(0, 40),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(CAUSAL_FORMS)), max_size=4),
    decay=st.sampled_from(DECAYS),
    normalize=st.booleans(),
)
def test_cutting_a_sequence_changes_nothing(n, cuts, decay, normalize):
    inputs = {
        name: None if x is None else x.detach() for name, x in draw(n, decay, features=normalize).items()
    }
    whole, last = linear_attention(**inputs, normalize=normalize, form="recurrent", return_state=True)
    state, start, parts = inputs.pop("state"), 0, []
    for stop, form in [*sorted((min(cut, n), form) for cut, form in cuts), (n, "auto")]:
        piece = {name: x if x is None or x.ndim == 1 else x[:, :, start:stop] for name, x in inputs.items()}
        with small_pieces(4, 8):
            out, state = linear_attention(
                **piece, normalize=normalize, state=state, form=form, return_state=True
            )
        parts.append(out)
        start = stop
    assert_close(torch.cat(parts, dim=2), whole)
    assert_close(state, last)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_extreme_decays_in_float32(form, decay):
    inputs = draw(70, decay, b=1, h=5, dtype=torch.float32)
    shape = inputs["log_decay"].shape
    extremes = torch.tensor([0.0, -1e4, -math.inf, -1e-6, -2.0])
    if decay == "head":
        log_decay = extremes.clone()
    else:
        log_decay = extremes[torch.randint(5, shape, generator=torch.Generator().manual_seed(0))]
    inputs["log_decay"] = log_decay.requires_grad_()
    results = linear_attention(**inputs, form=form, return_state=True)
    grads = gradients(results, inputs)
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = literal(**double)
    for ours, theirs in [
        *zip(results, expected, strict=True),
        *((grads[name], g) for name, g in gradients(expected, double).items()),
    ]:
        assert ours.isfinite().all()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_slow_decay_is_not_lost_to_rounding():
    # exp(-3e-8) is 1 in float32; over 4096 tokens the weight must still fall by 1.2e-4.
    n = 4096
    ones = torch.ones(1, 1, n, 1)
    value = torch.zeros(1, 1, n, 1)
    value[:, :, 0] = 1
    out = linear_attention(ones, ones, value, torch.tensor([-3e-8]))[0, 0, :, 0]
    assert_close(1 - out[-1], torch.tensor(3e-8 * (n - 1)), rtol=0.05, atol=0.0)


def test_limits_of_the_decay():
    q, k, v = (draw(20, None)[name].detach() for name in ("query", "key", "value"))
    own = (q * k).sum(-1, keepdim=True) * v
    for shape in ((3,), (2, 3, 20), (2, 3, 20, 5)):
        assert_close(linear_attention(q, k, v, torch.full(shape, -math.inf)), own)
        assert_close(linear_attention(q, k, v, torch.zeros(shape)), (q @ k.mT).tril() @ v)


@pytest.mark.parametrize("normalize", [False, True])
def test_without_causality_it_is_the_full_sum(normalize):
    inputs = draw(11, None, features=True)
    q, k, v = (inputs[name] for name in ("query", "key", "value"))
    weights = q[:, :, :6] @ k.mT
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out, state = linear_attention(q[:, :, :6], k, v, normalize=normalize, causal=False, return_state=True)
    assert_close(out, weights @ v)
    assert_close(state[..., :4], torch.einsum("bhnd,bhne->bhde", k, v))
    assert state.shape[-1] == 4 + normalize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_half_precision_sums_in_float32(form, dtype):
    inputs = draw(83, "token", dtype=dtype, b=1, h=2)
    inputs["state"] = inputs["state"].detach().float().requires_grad_()
    out, state = linear_attention(**inputs, form=form, return_state=True)
    expected, last = literal(**inputs)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert_close(state, last.float(), rtol=1e-5, atol=1e-5)
    assert (
        torch.equal(out.double(), expected.to(dtype).double())
        or ((out.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()
    )
    with torch.autocast("cpu", torch.bfloat16):
        _, under_autocast = linear_attention(**inputs, form=form, return_state=True)
    assert torch.equal(under_autocast, state)


@pytest.mark.parametrize("form", CAUSAL_FORMS)
def test_no_tokens(form):
    inputs = draw(0, "token")
    out, state = linear_attention(**inputs, form=form, return_state=True)
    assert out.shape == (2, 3, 0, 4)
    assert torch.equal(state, inputs["state"])


@pytest.mark.parametrize("decay", DECAYS)
def test_work_is_linear_in_the_length(decay):
    def work(n: int) -> int:
        inputs = draw(n, decay, b=1, h=1, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            linear_attention(**inputs).sum().backward()
        return counter.get_total_flops()

    assert work(8 * linear.SEGMENT) == 2 * work(4 * linear.SEGMENT)


@pytest.mark.parametrize("decay", DECAYS)
def test_backward_keeps_one_state_a_segment(decay):
    segments = 5
    inputs = draw(segments * linear.SEGMENT, decay, b=1, h=1)
    own = {x.untyped_storage().data_ptr() for x in inputs.values() if x is not None}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = linear_attention(**inputs)
    assert 0 < sum(kept.values()) <= segments * inputs["state"].numel()
    out.sum().backward()


@pytest.mark.compiled
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_compiles_whole(decay):
    inputs = draw(40, decay)
    with small_pieces():
        compiled = torch.compile(linear_attention, backend="aot_eager", fullgraph=True)
        results = compiled(**inputs, return_state=True)
        expected = linear_attention(**inputs, return_state=True)
        assert_close(results, expected)
        assert_close(gradients(results, inputs), gradients(expected, inputs))


def test_decay_slopes():
    assert decay_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert decay_slopes(4).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert decay_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert decay_slopes(1).tolist() == [1 / 256]
    assert_close(decay_slopes(16)[0].item(), math.sqrt(0.5))
    assert_close(decay_slopes(12)[8:], decay_slopes(16)[:8:2])


@pytest.mark.door
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "fast"}, r"form is 'fast', must be one of 'auto', 'recurrent', 'chunked'"),
        ({"query": torch.zeros(3, 5, 4)}, r"query has shape \(3, 5, 4\), must be \(b, h, n, d\)"),
        ({"key": torch.zeros(2, 3, 6, 4)}, r"key has shape \(2, 3, 6, 4\), must be \(2, 3, 5, 4\)"),
        ({"key": torch.zeros(4)}, r"key has shape \(4,\), must be \(2, 3, 5, 4\)"),
        ({"value": torch.zeros(2, 3, 4, 4)}, r"value has shape .*, must be \(2, 3, 5, e\)"),
        ({"log_decay": torch.zeros(2, 3)}, r"log_decay has shape \(2, 3\), must be \(3,\) or \(2, 3, 5\) or"),
        ({"state": torch.zeros(2, 3, 4, 8)}, r"state has shape \(2, 3, 4, 8\), must be \(2, 3, 4, 7\)"),
        (
            {"state": torch.zeros(2, 3, 4, 7), "normalize": True},
            r"state has shape \(2, 3, 4, 7\), must be \(2, 3, 4, 8\)",
        ),
        ({"log_decay": torch.zeros(3), "causal": False}, r"log_decay is given, must be None"),
        ({"state": torch.zeros(2, 3, 4, 7), "causal": False}, r"state is given, must be None"),
    ],
)
def test_errors(change, message):
    call = {
        "query": torch.zeros(2, 3, 5, 4),
        "key": torch.zeros(2, 3, 5, 4),
        "value": torch.zeros(2, 3, 5, 7),
    }
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**call, **change})


@pytest.mark.door
def test_no_heads_have_no_slopes():
    with pytest.raises(ValueError, match="heads is 0"):
        decay_slopes(0)
