"""Linear attention: a matrix of fixed size instead of keys and values that grow with the sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice, check_positive
from heedful.ops.precision import no_autocast
from heedful.ops.segments import in_segments, segment_sizes
from heedful.registry import register

CHUNK = 64  # tokens whose scores are computed as a square
SEGMENT = 1024  # tokens between two states that wait for the backward pass; a multiple of CHUNK
FORMS = ("auto", "recurrent", "chunked")
WITH_KERNEL = (*FORMS, "kernel")


@register("linear-attention", kind="op", tags=("linear", "decode"), complexity="O(N D E)")
def linear_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    log_decay: Float[Tensor, " h"] | Float[Tensor, "b h m"] | Float[Tensor, "b h m d"] | None = None,
    *,
    normalize: bool = False,
    state: Float[Tensor, "b h d s"] | None = None,
    return_state: bool = False,
    causal: bool = True,
    form: str = "auto",
) -> Float[Tensor, "b h n e"] | tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d s"]]:
    """Attention without softmax, through a state S of d x e numbers a head.

        S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t,    o_t = q_t S_t

    The current token enters undecayed; nothing is scaled. Not causal: o = q (sum_j k_j^T v_j).
    With `normalize`, z_t = exp(log_decay_t) z_{t-1} + k_t and o_t = q_t S_t / (q_t . z_t): the weights
    of a row sum to 1. Queries and keys must then be non-negative (features); where q_t . z_t is exactly
    0 nothing was seen and the row is zeros. A token with a zero key takes no part.

    query, key    (b, h, n, d); key may have another length than query where causal=False
    value         (b, h, n, e)
    log_decay     natural logarithms, <= 0 (not checked), of what a token leaves of the state before it: None
                  (nothing is lost), (h,), (b, h, n), or (b, h, n, d), which decays the rows of S apart.
                  -inf forgets all
    state         S before the first token, (b, h, d, e), zeros if None; with `normalize` (b, h, d, e + 1),
                  z as the last column
    return_state  also give the state after the last token: the call on the next tokens continues the sequence
    form          how, never what: "recurrent" (token by token, the definition), "chunked" (squares of 64
                  tokens joined by states), "auto" (recurrent below 4 tokens, else chunked), "kernel" (chunks
                  in Triton, on CUDA; tested in Triton's interpreter and not yet measured on a GPU, so that
                  "auto" does not take it)

    Sums and state are float32, or float64 if any input is; the output has the dtype of query. Gradients of
    any order reach every tensor argument, of the first order alone with "kernel", where a second backward
    raises RuntimeError. Backward keeps one state for every 1024 tokens and computes the rest again; "kernel"
    keeps none, and one for every 64 tokens while a pass runs.

    Raises ValueError if shapes do not fit, `form` is unknown or "kernel" cannot serve (no Triton, not CUDA,
    float64), or causal=False comes with log_decay or state.
    Source: linear attention, arXiv 2006.16236; decay and chunks, Lightning Attention-2, arXiv 2401.04658.
    """
    _check(query, key, value, log_decay, normalize, state, causal, form)
    tensors = [t for t in (query, key, value, log_decay, state) if t is not None]
    work = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32

    with no_autocast(query):
        if normalize:  # z is the state of a value that is always 1
            value = F.pad(value, (0, 1), value=1.0)
        if causal:
            batch, heads, n, dim = query.shape
            if log_decay is None:
                log_decay = query.new_zeros(heads, dtype=work)
            if state is None:
                state = query.new_zeros(batch, heads, dim, value.shape[-1], dtype=work)
            if form == "auto":
                form = "recurrent" if n < 4 else "chunked"
            if form == "kernel":
                out_dtype = work if normalize else query.dtype
                out, state = _kernel(query, key, value, log_decay, state, out_dtype)
            else:
                run = _recurrent if form == "recurrent" else _chunked
                out, state = run(query, key, value, log_decay, state.to(work))
        else:
            state = key.to(work).mT @ value.to(work)
            out = query.to(work) @ state
        if normalize:
            total = out[..., -1:]
            empty = total == 0
            out = (out[..., :-1] / total.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
        out = out.to(query.dtype)
    return (out, state) if return_state else out


def decay_slopes(heads: int) -> Float[Tensor, " h"]:
    """Fixed decay rates of the heads, as ALiBi's slopes: 2^(-8 (i + 1) / h), i from 0, in float64.

    If h is no power of two: the rates for the greatest power of two p below it, followed by every second
    rate of those for 2 p, as many as are missing. Source: arXiv 2108.12409.
    """
    check_positive("heads", heads)
    power = 1 << (heads.bit_length() - 1)
    rates = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    rates += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(rates, dtype=torch.float64)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    normalize: bool,
    state: Tensor | None,
    causal: bool,
    form: str,
) -> None:
    check_choice("form", form, WITH_KERNEL)
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, must be (b, h, n, d)")
    b, h, n, d = query.shape
    m = n if causal or key.ndim != 4 else key.shape[2]
    if key.shape != (b, h, m, d):
        raise ValueError(f"key has shape {tuple(key.shape)}, must be {(b, h, m, d)}")
    if value.ndim != 4 or value.shape[:3] != (b, h, m):
        raise ValueError(f"value has shape {tuple(value.shape)}, must be ({b}, {h}, {m}, e)")
    if not causal:
        for name, given in (("log_decay", log_decay), ("state", state)):
            if given is not None:
                raise ValueError(f"{name} is given, must be None with causal=False")
    shapes = [(h,), (b, h, m), (b, h, m, d)]
    if log_decay is not None and log_decay.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}, must be {wanted}")
    wanted_state = (b, h, d, value.shape[-1] + normalize)
    if state is not None and state.shape != wanted_state:
        raise ValueError(f"state has shape {tuple(state.shape)}, must be {wanted_state}")


# -- token by token -------------------------------------------------------------------------------


def _recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    """The definition. State and result have the dtype of S."""
    n = q.shape[2]
    decay = g.to(S.dtype).exp()[..., None]
    if g.ndim < 4:
        decay = decay[..., None]
    # One decay a step, (h, 1, 1), (b, h, 1, 1) or (b, h, d, 1), against the S of (b, h, d, e).
    decays = [decay] * n if g.ndim == 1 else decay.unbind(2)
    q, k, v = q.to(S.dtype), k.to(S.dtype), v.to(S.dtype)
    outs = []
    for q_t, k_t, v_t, decay_t in zip(q.unbind(2), k.unbind(2), v.unbind(2), decays, strict=True):
        S = decay_t * S + k_t[..., :, None] * v_t[..., None, :]
        outs.append((q_t[..., None, :] @ S)[..., 0, :])
    return (torch.stack(outs, dim=2) if outs else q @ S), S


# -- in Triton ------------------------------------------------------------------------------------


@torch.compiler.disable
def _kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from heedful.ops.backends.triton.recurrences import check_served

    check_served(query=q, key=k, value=v, log_decay=g, state=S)
    if q.numel() == 0 or v.numel() == 0:
        out, state = _chunked(q, k, v, g, S.float())
        return out, state
    from heedful.ops.backends.triton.linear import linear_attention

    return linear_attention(q, k, v, g.float(), S.float(), dtype)


# -- chunk by chunk -------------------------------------------------------------------------------


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    """Segments of whole chunks one after another, and the last cut chunk by itself."""
    n = q.shape[2]
    if n == 0:
        return q.to(S.dtype) @ S, S
    sizes = segment_sizes(n, segment=SEGMENT, chunk=CHUNK)
    if g.ndim > 1:
        return in_segments(_segment, (q, k, v, g), (S,), sizes=sizes, keep=SEGMENT)

    def with_fixed_decay(
        q: Tensor, k: Tensor, v: Tensor, S: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (*_segment(q, k, v, g, S), g)

    out, S, _ = in_segments(with_fixed_decay, (q, k, v), (S, g), sizes=sizes, keep=SEGMENT)
    return out, S


def _segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """t chunks of c tokens: scores inside a chunk, states between chunks."""
    c = min(CHUNK, q.shape[2])
    q, k, v = (x.to(S.dtype).unflatten(2, (-1, c)) for x in (q, k, v))  # b h t c d
    g = g.to(S.dtype)

    # Decays are sums of log_decay over the tokens between, all <= 0: since the chunk's start for queries,
    # until its end for keys. No sum is a difference, so -inf and great spans do no harm.
    if g.ndim == 4:
        scores, since, until = _channel_scores(q, k, g.unflatten(2, (-1, c)))
    else:
        g = g[None, :, None, None].expand(1, -1, 1, c) if g.ndim == 1 else g.unflatten(2, (-1, c))
        between = decay_sums(g)
        scores = (q @ k.mT) * between.exp()
        since, until = g.cumsum(-1)[..., None], between[..., -1, :, None]

    entered = (k * until.exp()).mT @ v  # b h t d e: what a chunk adds to the state
    total = since[..., -1, :, None].expand(-1, -1, q.shape[2], -1, -1)  # b h t d|1 1
    before = []
    for entered_t, *kept_t in zip(entered.unbind(2), *(x.unbind(2) for x in exp_in_two(total)), strict=True):
        before.append(S)
        S = fade(S, *kept_t) + entered_t
    out = scores @ v + (q * since.exp()) @ torch.stack(before, dim=2)
    return out.flatten(2, 3), S


def exp_in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x) for x <= 0 as 1 or 0 and the rest.

    A state that loses 1e-7 a chunk would lose 1.2e-7 or nothing with a rounded exp(x), chunk after chunk.
    """
    slow = x > -0.1
    return slow.to(x.dtype), torch.where(slow, x.expm1(), x.exp())


def fade(S: Tensor, whole: Tensor, rest: Tensor) -> Tensor:
    """S exp(x), of the two parts of exp(x)."""
    return torch.addcmul(whole * S, rest, S)


def decay_sums(g: Tensor) -> Tensor:
    """(..., c) to (..., c, c): at [i, j] the sum of g over j < l <= i, and -inf where j > i."""
    c = g.shape[-1]
    causal = torch.ones(c, c, dtype=torch.bool, device=g.device).tril()
    sums = torch.where(causal.tril(-1), g[..., None], 0.0).cumsum(-2)
    return sums.masked_fill(~causal, -math.inf)


def _channel_scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of a chunk whose channels decay apart: sum_c q_ic k_jc exp(sum of g_lc over j < l <= i).

    Two neighbouring blocks become one of twice the width. For a query of the second and a key of the first
    the exponent splits at the border into two sums <= 0, and the scores between are one product. (A split at
    the chunk's start would need exp(-sum), which overflows.) Blocks begin as single tokens.

    q, k, g (..., c, d) to scores (..., c, c), sums of g from the start to each token, and from behind each
    token to the end (..., c, d).
    """
    c = q.shape[-2]
    width = 1 << (c - 1).bit_length()
    q, k, g = (F.pad(x, (0, 0, 0, width - c)) for x in (q, k, g))
    scores = (q * k).sum(-1)[..., None, None]  # ..., blocks, width, width
    since = g[..., None, :]  # ..., blocks, width, d
    until = torch.zeros_like(since)
    while scores.shape[-3] > 1:
        scores1, scores2 = scores.unflatten(-3, (-1, 2)).unbind(-3)
        since1, since2 = since.unflatten(-3, (-1, 2)).unbind(-3)
        until1, until2 = until.unflatten(-3, (-1, 2)).unbind(-3)
        w = since1.shape[-2]
        q2 = q.unflatten(-2, (-1, 2, w))[..., 1, :, :] * since2.exp()
        k1 = k.unflatten(-2, (-1, 2, w))[..., 0, :, :] * until1.exp()
        scores = torch.cat([F.pad(scores1, (0, w)), torch.cat([q2 @ k1.mT, scores2], -1)], -2)
        whole1, whole2 = since1[..., -1:, :], since2[..., -1:, :]
        since = torch.cat([since1, since2 + whole1], -2)
        until = torch.cat([until1 + whole2, until2], -2)
    return scores[..., 0, :c, :c], since[..., 0, :c, :], until[..., 0, :c, :]
