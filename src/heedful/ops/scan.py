"""Selective scan: a state space of s numbers a channel whose step, input and output depend on the token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from heedful.checks import check_choice
from heedful.ops.precision import no_autocast
from heedful.ops.segments import in_segments, segment_sizes
from heedful.registry import register

CHUNK = 16  # tokens of a chunk; the chunks of a segment advance side by side
SEGMENT = 128  # tokens between two states that wait for the backward pass; a multiple of CHUNK
FORMS = ("auto", "recurrent", "chunked", "kernel")


@register("selective-scan", kind="op", paper="mamba", tags=("state space", "decode"), complexity="O(N D S)")
def selective_scan(
    u: Float[Tensor, "b d n"],
    delta: Float[Tensor, "b d n"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "b s n"] | Float[Tensor, "b g s n"],
    C: Float[Tensor, "b s n"] | Float[Tensor, "b g s n"],
    D: Float[Tensor, " d"] | None = None,
    *,
    z: Float[Tensor, "b d n"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    state: Float[Tensor, "b d s"] | None = None,
    return_state: bool = False,
    form: str = "auto",
) -> Float[Tensor, "b d n"] | tuple[Float[Tensor, "b d n"], Float[Tensor, "b d s"]]:
    """The recurrence of Mamba (S6), channel by channel, with a diagonal transition.

        delta = softplus(delta + delta_bias)
        h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t,    y_t = (C_t . h_t + D u_t) silu(z_t)

    u             input, (b, d, n): d channels of n tokens
    delta         step of every channel and token, (b, d, n), >= 0 once bias and softplus are applied (not
                  checked); a token with step 0 takes no part
    A             transition, (d, s), <= 0 (not checked)
    B, C          what enters the state and what is read from it, (b, s, n), or (b, g, s, n) for g groups of
                  d / g consecutive channels
    D             weight (d,) of the input in the output; None: 0
    z             gate (b, d, n); None: no gate
    delta_bias    (d,), added to delta; None: 0
    delta_softplus  whether softplus is applied to delta
    state         h before the first token, (b, d, s), zeros if None
    return_state  also give the state after the last token: the call on the next tokens continues the sequence
    form          how, never what: "recurrent" (token by token, the definition), "chunked" (chunks of 16
                  tokens side by side, joined by states), "auto" (recurrent below 4 tokens, else chunked),
                  "kernel" (chunks in Triton, on CUDA; tested in Triton's interpreter and not yet measured on
                  a GPU, so that "auto" does not take it)

    Sums and state are float32, or float64 if any input is; the output has the dtype of u. Gradients of any
    order reach every tensor argument, of the first order alone with "kernel", where a second backward raises
    RuntimeError. Backward of the chunked form keeps one state for every 128 tokens and computes the rest
    again, that of "kernel" one for every 64.

    Raises ValueError if shapes do not fit, `form` is unknown or "kernel" cannot serve (no Triton, not CUDA,
    float64, s above 256).
    Source: Mamba, arXiv 2312.00752.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, state, form)
    given = (u, delta, A, B, C, D, z, delta_bias, state)
    work = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in given) else torch.float32
    batch, dim, n = u.shape

    with no_autocast(u):
        if form == "kernel" and u.numel() and A.numel():
            y, state = _kernel(u, delta, A, B, C, D, z, delta_bias, state, delta_softplus)
            return (y, state) if return_state else y
        x, step = u.to(work), delta.to(work)
        if delta_bias is not None:
            step = step + delta_bias.to(work)[:, None]
        if delta_softplus:
            step = F.softplus(step)
        B, C = ((t if t.ndim == 4 else t[:, None]).to(work).mT for t in (B, C))  # b g n s
        groups = B.shape[1]
        inputs, steps = (rearrange(t, "b (g d) n -> b g n d", g=groups) for t in (x, step))
        tokens = (inputs, steps, B, C)
        rates = A.to(work).unflatten(0, (groups, -1))
        state = u.new_zeros(batch, dim, A.shape[1], dtype=work) if state is None else state.to(work)
        h = state.unflatten(1, (groups, -1))

        def segment(*given: Tensor) -> tuple[Tensor, Tensor]:
            return _Segment.apply(*given, rates)

        if form == "auto":
            form = "recurrent" if n < 4 else "chunked"
        if n == 0:
            y = inputs
        elif form == "recurrent":
            y, h = _recurrent(*tokens, h, rates)
        else:
            sizes = segment_sizes(n, segment=SEGMENT, chunk=CHUNK)
            y, h = in_segments(segment, tokens, (h,), sizes=sizes, keep=n)  # keeps inputs and h by itself
        y, state = rearrange(y, "b g n d -> b (g d) n"), h.flatten(1, 2)
        if D is not None:
            y = y + D.to(work)[:, None] * x
        if z is not None:
            y = y * F.silu(z.to(work))
        y = y.to(u.dtype)
    return (y, state) if return_state else y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    form: str,
) -> None:
    check_choice("form", form, FORMS)
    if u.ndim != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}, must be (b, d, n)")
    b, d, n = u.shape
    if A.ndim != 2 or A.shape[0] != d:
        raise ValueError(f"A has shape {tuple(A.shape)}, must be ({d}, s)")
    s = A.shape[1]
    for name, x, shape in (
        ("delta", delta, (b, d, n)),
        ("D", D, (d,)),
        ("z", z, (b, d, n)),
        ("delta_bias", delta_bias, (d,)),
        ("state", state, (b, d, s)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must be {shape}")
    for name, x in (("B", B), ("C", C)):
        groups = (x.shape[1],) if x.ndim == 4 else ()
        if x.shape != (b, *groups, s, n) or (groups and (groups[0] == 0 or d % groups[0])):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, must be ({b}, {s}, {n}) or ({b}, g, {s}, {n}) "
                f"where g divides {d} (channels)"
            )
    if B.shape != C.shape:
        raise ValueError(f"C has shape {tuple(C.shape)}, must be that of B, {tuple(B.shape)}")


@torch.compiler.disable
def _kernel(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    from heedful.ops.backends.triton.recurrences import check_served

    check_served(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, state=state)
    batch, dim, _ = u.shape
    B, C = (t if t.ndim == 4 else t[:, None] for t in (B, C))
    if state is None:
        state = u.new_zeros(batch, dim, A.shape[1], dtype=torch.float32)
    from heedful.ops.backends.triton.scan import WIDEST, selective_scan

    if A.shape[1] > WIDEST:
        raise ValueError(f"A has shape {tuple(A.shape)}, s must be at most {WIDEST} for form='kernel'")
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, state.float(), softplus=softplus)


# Inside: u, step (b, g, n, d), B, C (b, g, n, s), h (b, g, d, s) and the rates A (g, d, s) of g groups.


def _recurrent(u: Tensor, step: Tensor, B: Tensor, C: Tensor, h: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The definition."""
    outs = []
    for u_t, step_t, B_t, C_t in zip(u.unbind(2), step.unbind(2), B.unbind(2), C.unbind(2), strict=True):
        h = (step_t[..., None] * A).exp() * h + (step_t * u_t)[..., None] * B_t[..., None, :]
        outs.append((C_t[..., None, :] * h).sum(-1))
    return torch.stack(outs, dim=2), h


class _Segment(Function):
    """t chunks of c tokens. Backward has the inputs and the state before, and computes the states again.

    The gradient e of h_(t-1) runs back as h runs forth, by the same decays: with w_t = dy_t C_t
        e_t = exp(delta_t A) (w_t + e_(t+1))
    Backward is made of differentiable operations, so that gradients of any order exist.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, step: Tensor, B: Tensor, C: Tensor, before: Tensor, A: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u, step, B, C, before, A)
        u, step, B, C = (_split(x) for x in (u, step, B, C))
        decay, kept = (step[..., None] * A).exp(), (step.sum(0)[..., None] * A).exp()
        h, last = _states(decay, (step * u)[..., None] * B[..., None, :], kept, before)
        return _join((h[1:] @ C[..., None])[..., 0]), last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *tokens, before, A = ctx.saved_tensors
        with no_autocast(before):
            u, step, B, C, dy = (_split(x) for x in (*tokens, grads[0]))
            decay, kept = (step[..., None] * A).exp(), (step.sum(0)[..., None] * A).exp()
            h, _ = _states(decay, (step * u)[..., None] * B[..., None, :], kept, before)

            w = dy[..., None] * C[..., None, :]
            e, d_before = _states(decay, decay * w, kept, grads[1], back=True)
            dh = w + e[1:]
            d_exponent = e[:-1] * h[:-1]
            d_entered = (dh @ B[..., None])[..., 0]  # of step u
            d_step = (d_exponent * A).sum(-1) + d_entered * u
            dA = (d_exponent * step[..., None]).sum((0, 1, 2))
            dB = ((step * u)[..., None, :] @ dh)[..., 0, :]
            dC = (dy[..., None, :] @ h[1:])[..., 0, :]
            return _join(d_entered * step), _join(d_step), _join(dB), _join(dC), d_before, dA


def _split(x: Tensor) -> Tensor:
    # Contiguous, because what is computed from it takes its layout, and is walked through by c and t.
    return rearrange(x, "b g (t c) d -> c b t g d", c=min(CHUNK, x.shape[2])).contiguous()


def _join(x: Tensor) -> Tensor:
    return rearrange(x, "c b t g d -> b g (t c) d")


def _states(
    decay: Tensor, entered: Tensor, kept: Tensor, state: Tensor, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """h_i = decay_i h_(i-1) + entered_i over t chunks of c tokens; with `back` from the last to the first.

    decay, entered (c, b, t, g, d, s), kept (b, t, g, d, s) the decay over a chunk, state (b, g, d, s).
    Gives (c + 1, b, t, g, d, s), the states with the one that came into each chunk, in the order of tokens,
    and the state that leaves. First all chunks run from nothing, side by side, to know what they add; then
    again from what comes into each. (A quotient of cumulated decays needs no second run, but overflows.)
    """
    way = slice(None, None, -1 if back else 1)
    steps = list(zip(decay.unbind(0)[way], entered.unbind(0)[way], strict=True))
    added = steps[0][1]
    for decay_i, entered_i in steps[1:]:
        added = torch.addcmul(entered_i, decay_i, added)
    came = []
    for kept_t, added_t in zip(kept.unbind(1)[way], added.unbind(1)[way], strict=True):
        came.append(state)
        state = torch.addcmul(added_t, kept_t, state)
    h = [torch.stack(came[way], dim=1)]
    for decay_i, entered_i in steps:
        h.append(torch.addcmul(entered_i, decay_i, h[-1]))
    return torch.stack(h[way]), state
