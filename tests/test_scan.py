from __future__ import annotations

from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from heedful.ops import scan
from heedful.ops.scan import selective_scan

FORMS = ("recurrent", "chunked", "auto")
OF_TOKENS = ("u", "delta", "B", "C", "z")
Inputs = dict[str, Tensor]


def small_pieces(chunk: int = 4, segment: int = 12):
    """Chunks and segments so small that short sequences have many, all but one recomputed in backward."""
    return patch.multiple(scan, CHUNK=chunk, SEGMENT=segment)


def draw(
    n: int, *, b: int = 2, d: int = 6, s: int = 3, g: int = 2, dtype: torch.dtype = torch.float64
) -> Inputs:
    generator = torch.Generator().manual_seed(n)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    drawn = {
        "u": normal(b, d, n),
        "delta": normal(b, d, n) - 1,
        "A": -normal(d, s).exp(),
        "B": normal(b, g, s, n),
        "C": normal(b, g, s, n),
        "D": normal(d),
        "z": normal(b, d, n),
        "delta_bias": normal(d),
        "state": normal(b, d, s),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}


def literal(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Number by number over channels and tokens, in float64, with softplus."""
    given = {name: x.double() for name, x in inputs.items()}
    u, delta, A, B, C = (given[name] for name in ("u", "delta", "A", "B", "C"))
    b, d, n = u.shape
    outs, lasts = [], []
    for row in range(b):
        for channel in range(d):
            group = channel // (d // B.shape[1])
            h = given["state"][row, channel]
            for t in range(n):
                raw = delta[row, channel, t] + given["delta_bias"][channel]
                step = torch.logaddexp(raw, torch.zeros_like(raw))
                h = torch.exp(step * A[channel]) * h + step * u[row, channel, t] * B[row, group, :, t]
                y = torch.dot(C[row, group, :, t], h) + given["D"][channel] * u[row, channel, t]
                gate = given["z"][row, channel, t]
                outs.append(y * gate / (1 + torch.exp(-gate)))
            lasts.append(h)
    return torch.stack(outs).reshape(b, d, n), torch.stack(lasts).reshape(b, d, -1)


def gradients(results: tuple[Tensor, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of output and final state."""
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (r.double() * torch.randn(r.shape, generator=generator, dtype=torch.float64)).sum() for r in results
    )
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))


def run(inputs: Inputs, **options) -> tuple[Tensor, Tensor]:
    return selective_scan(**inputs, delta_softplus=True, return_state=True, **options)


@pytest.mark.parametrize("g", [1, 2, 6])
@pytest.mark.parametrize("n", [1, 12, 31])
@pytest.mark.parametrize("form", FORMS)
def test_equals_loops_over_channels_and_tokens(form, n, g):
    inputs = draw(n, g=g)
    with small_pieces():
        results = run(inputs, form=form)
        grads = gradients(results, inputs)
    expected = literal(inputs)
    assert_close(results, expected)
    assert_close(grads, gradients(expected, inputs))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_what_is_left_out_changes_nothing(form):
    inputs = draw(9, g=1)
    plain = {**inputs, "delta": inputs["delta"].abs()}
    plain["B"], plain["C"] = plain["B"][:, 0], plain["C"][:, 0]
    for name in ("D", "z", "delta_bias", "state"):
        del plain[name]
    bare = selective_scan(**plain, form=form)
    # softplus(log(e^x - 1)) = x; silu(z) = 1 where z = 1.2784645...
    neutral = {
        **inputs,
        "delta": torch.log(torch.expm1(plain["delta"])),
        "D": inputs["D"] * 0,
        "z": torch.full_like(inputs["z"], 1.2784645427610738),
        "delta_bias": inputs["delta_bias"] * 0,
        "state": inputs["state"] * 0,
    }
    assert_close(bare, literal(neutral)[0])


def test_several_full_segments_equal_the_recurrent_form():
    inputs = draw(2 * scan.SEGMENT + 3 * scan.CHUNK + 7, b=1)
    results = run(inputs)
    expected = run(inputs, form="recurrent")
    assert_close(results, expected)
    assert_close(gradients(results, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_derivatives_of_first_and_second_order(form):
    inputs = draw(5, b=1, d=2, s=2, g=1)

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return run(dict(zip(inputs, given, strict=True)), form=form)

    with small_pieces(2, 4):
        assert torch.autograd.gradcheck(call, list(inputs.values()))
        assert torch.autograd.gradgradcheck(call, list(inputs.values()))


@given(
    n=st.integers(0, 40),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(FORMS)), max_size=4),
)
def test_cutting_a_sequence_changes_nothing(n, cuts):
    inputs = {name: x.detach() for name, x in draw(n).items()}
    whole, last = run(inputs, form="recurrent")
    state, start, parts = inputs.pop("state"), 0, []
    for stop, form in [*sorted((min(cut, n), form) for cut, form in cuts), (n, "auto")]:
        piece = {name: x[..., start:stop] if name in OF_TOKENS else x for name, x in inputs.items()}
        with small_pieces():
            out, state = run({**piece, "state": state}, form=form)
        parts.append(out)
        start = stop
    assert_close(torch.cat(parts, dim=2), whole)
    assert_close(state, last)


@pytest.mark.parametrize("form", FORMS)
def test_one_channel_without_loss_sums_its_input(form):
    n = 40
    u = torch.randn(1, 1, n, dtype=torch.float64)
    ones = torch.ones(1, 1, n, dtype=torch.float64)
    y = selective_scan(u, ones, torch.zeros(1, 1), ones, ones, form=form)
    assert_close(y, u.cumsum(-1))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_a_step_of_zero_takes_no_part(form):
    inputs = draw(23)
    for name in ("D", "z", "delta_bias"):
        del inputs[name]
    keep = torch.arange(23) % 3 != 1
    inputs["delta"] = inputs["delta"].abs().masked_fill(~keep, 0.0)
    kept = {name: x[..., keep] if name in OF_TOKENS else x for name, x in inputs.items()}
    with small_pieces():
        y, state = selective_scan(**inputs, form=form, return_state=True)
        fewer, last = selective_scan(**kept, form=form, return_state=True)
    assert_close(y[..., keep], fewer)
    assert_close(state, last)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_extreme_decays_in_float32(form):
    inputs = draw(300, b=1, d=2, s=4, g=1, dtype=torch.float32)
    extremes = torch.tensor([-90.0, -14.0, 0.0, 5.0, 1e4])  # softplus: 0, 1e-6, 0.7, 5, 1e4
    pick = torch.randint(5, inputs["delta"].shape, generator=torch.Generator().manual_seed(0))
    inputs["delta"] = extremes[pick].requires_grad_()
    inputs["A"] = torch.tensor([[0.0, -1e-6, -1.0, -1e6]]).repeat(2, 1).requires_grad_()
    results = run(inputs, form=form)
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
@pytest.mark.parametrize("shift", [-12.0, 0.0, 1e4])
def test_64k_tokens_stay_near_float64(shift, dtype):
    inputs = {name: x.detach() for name, x in draw(65536, b=1, d=2, s=2, g=1, dtype=dtype).items()}
    inputs["delta_bias"] = inputs["delta_bias"] + shift
    y, _ = run(inputs)
    exact, _ = run({name: x.double() for name, x in inputs.items()})
    assert y.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (y - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_half_precision_sums_in_float32(form, dtype):
    inputs = draw(43, b=1, dtype=dtype)
    inputs["state"] = inputs["state"].detach().float().requires_grad_()
    y, state = run(inputs, form=form)
    expected, last = literal(inputs)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert_close(state, last.float(), rtol=1e-5, atol=1e-5)
    assert ((y.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()
    with torch.autocast("cpu", torch.bfloat16):
        _, under_autocast = run(inputs, form=form)
    assert torch.equal(under_autocast, state)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    inputs = draw(0)
    y, state = run(inputs, form=form)
    assert y.shape == (2, 6, 0)
    assert torch.equal(state, inputs["state"])


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_the_last_token_do_not_mix(form):
    inputs = draw(13)
    y, _ = run(inputs, form=form)
    seen = torch.autograd.grad(y[:, :3, -1].sum(), [inputs["B"], inputs["C"]])
    for grad in seen:
        assert grad[:, 0].abs().sum() > 0
        assert not grad[:, 1].any()


@pytest.mark.parametrize("learned", [None, "A"])
def test_backward_keeps_one_state_a_segment(learned):
    segments = 5
    inputs = draw(segments * scan.SEGMENT, b=1, d=2, s=16, g=1)
    if learned is not None:
        inputs = {name: x.detach().requires_grad_(name == learned) for name, x in inputs.items()}
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    given = {name: inputs[name] for name in ("u", "delta", "A", "B", "C", "state")}
    with saved_tensors_hooks(pack, lambda x: x):
        out = selective_scan(**given)
    assert 0 < sum(kept.values()) <= segments * inputs["state"].numel()
    out.sum().backward()


def test_work_is_linear_in_the_length():
    def work(n: int) -> int:
        """Numbers in all tensors that forward and backward make."""

        class Count(TorchDispatchMode):
            total = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                self.total += out.numel() if isinstance(out, Tensor) else 0
                return out

        inputs = draw(n, b=1, d=2, s=16, g=1, dtype=torch.float32)
        with Count() as count:
            run(inputs)[0].sum().backward()
        return count.total

    two, four, six = (work(n * scan.SEGMENT) for n in (2, 4, 6))
    assert six - four == four - two


@pytest.mark.compiled
def test_compiles_whole():
    inputs = draw(29)
    with small_pieces():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        results = compiled(inputs)
        expected = run(inputs)
        assert_close(results, expected)
        assert_close(gradients(results, inputs), gradients(expected, inputs))


@pytest.mark.door
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "fast"}, r"form is 'fast', must be one of 'auto', 'recurrent', 'chunked'"),
        ({"u": torch.zeros(4, 5)}, r"u has shape \(4, 5\), must be \(b, d, n\)"),
        ({"delta": torch.zeros(2, 4, 6)}, r"delta has shape \(2, 4, 6\), must be \(2, 4, 5\)"),
        ({"A": torch.zeros(3, 3)}, r"A has shape \(3, 3\), must be \(4, s\)"),
        ({"B": torch.zeros(2, 3, 3, 5)}, r"B has shape .*, must be \(2, 3, 5\) or .* where g divides 4"),
        ({"C": torch.zeros(2, 2, 5)}, r"C has shape \(2, 2, 5\), must be \(2, 3, 5\) or"),
        ({"C": torch.zeros(2, 2, 3, 5)}, r"C has shape \(2, 2, 3, 5\), must be that of B, \(2, 3, 5\)"),
        ({"D": torch.zeros(5)}, r"D has shape \(5,\), must be \(4,\)"),
        ({"z": torch.zeros(2, 4)}, r"z has shape \(2, 4\), must be \(2, 4, 5\)"),
        ({"delta_bias": torch.zeros(2, 4)}, r"delta_bias has shape \(2, 4\), must be \(4,\)"),
        ({"state": torch.zeros(2, 4, 2)}, r"state has shape \(2, 4, 2\), must be \(2, 4, 3\)"),
    ],
)
def test_errors(change, message):
    call = {
        "u": torch.zeros(2, 4, 5),
        "delta": torch.zeros(2, 4, 5),
        "A": torch.zeros(4, 3),
        "B": torch.zeros(2, 3, 5),
        "C": torch.zeros(2, 3, 5),
    }
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**call, **change})
