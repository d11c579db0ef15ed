"""Softmax attention of one query over every prefix: a recurrence with a state of fixed size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice
from heedful.ops.linear import linear_attention
from heedful.ops.precision import no_autocast
from heedful.ops.segments import in_segments, segment_sizes
from heedful.registry import register

FORMS = ("auto", "recurrent", "scan", "chunked")
SEGMENT = 2048  # tokens between two states that wait for the backward pass


class SoftmaxState(NamedTuple):
    """Of the tokens seen: the greatest score m, u = sum exp(s_j - m) and w = sum exp(s_j - m) v_j."""

    maximum: Float[Tensor, "b h"]
    total: Float[Tensor, "b h"]
    weighted: Float[Tensor, "b h e"]


@register("softmax-prefix-scan", kind="op", paper="aaren", tags=("softmax", "decode"), complexity="O(N E)")
def softmax_prefix_scan(
    scores: Float[Tensor, "b h n"],
    value: Float[Tensor, "b h n e"],
    *,
    state: SoftmaxState | None = None,
    return_state: bool = False,
    form: str = "auto",
) -> Float[Tensor, "b h n e"] | tuple[Float[Tensor, "b h n e"], SoftmaxState]:
    """Softmax attention over tokens 0..k for every k, of a query that is the same for all k.

        o_k = sum_(j <= k) exp(s_j) v_j / sum_(j <= k) exp(s_j)
        m_k = max(m_(k-1), s_k);  u_k = u_(k-1) exp(m_(k-1) - m_k) + exp(s_k - m_k);  w likewise with v_k
        o_k = w_k / u_k

    scores        (b, h, n), logits of the query with each key; -inf hides a token
    value         (b, h, n, e)
    state         (m, u, w) of the tokens before: (b, h), (b, h), (b, h, e); m = -inf, u = w = 0 if None
    return_state  also give the state after the last token: the call on the next tokens continues the sequence
    form          how, never what: "recurrent" (token by token, the definition), "scan" (parallel prefix scan
                  of (m, u, w), log n rounds and O(n) work, for 2048 tokens at a time), "chunked" (linear
                  attention with the decays m_(k-1) - m_k, in chunks), "auto" (recurrent below 4 tokens,
                  else scan)

    A prefix that shows no token gives zeros. No exponent is above 0, whatever the scores. Sums and state are
    float32, or float64 if any input is; the output has the dtype of value. Gradients reach scores, value, u
    and w; m only shifts what u and w are relative to and counts as a constant. In backward,
    scan and chunked keep one state for every 2048 or 1024 tokens and compute the rest again.

    Raises ValueError if shapes do not fit or `form` is unknown.
    Source: Attention as an RNN, arXiv 2405.13956.
    """
    _check(scores, value, state, form)
    tensors = (scores, value) if state is None else (scores, value, *state)
    work = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    batch, heads, n, width = value.shape

    with no_autocast(value):
        if state is None:
            m, u, w = (
                value.new_full((batch, heads), -math.inf, dtype=work),
                value.new_zeros(batch, heads, dtype=work),
                value.new_zeros(batch, heads, width, dtype=work),
            )
        else:
            m, u, w = (t.to(work) for t in state)
        if form == "auto":
            form = "recurrent" if n < 4 else "scan"
        scores, last = scores.to(work), SoftmaxState(m.detach(), u, w)
        if n == 0:
            out = value
        elif form == "recurrent":
            out, last = _recurrent(scores, value.to(work), last)
        elif form == "chunked":
            out, last = _chunked(scores, value.to(work), last)
        else:
            sizes = segment_sizes(n, segment=SEGMENT, chunk=SEGMENT)
            out, *states = in_segments(_scan, (scores, value.to(work)), last, sizes=sizes, keep=SEGMENT)
            last = SoftmaxState(*states)
        out = out.to(value.dtype)
    return (out, last) if return_state else out


def _check(scores: Tensor, value: Tensor, state: SoftmaxState | None, form: str) -> None:
    check_choice("form", form, FORMS)
    if scores.ndim != 3:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, must be (b, h, n)")
    b, h, n = scores.shape
    if value.ndim != 4 or value.shape[:3] != (b, h, n):
        raise ValueError(f"value has shape {tuple(value.shape)}, must be ({b}, {h}, {n}, e)")
    if state is not None:
        shapes, wanted = [tuple(t.shape) for t in state], [(b, h), (b, h), (b, h, value.shape[3])]
        if shapes != wanted:
            raise ValueError(f"state has shapes {shapes}, must be {wanted}")


def _weight(score: Tensor, maximum: Tensor) -> Tensor:
    """exp(score - maximum); 0 where both are -inf, because nothing was seen."""
    return (score - maximum.masked_fill(maximum == -math.inf, 0.0)).exp()


def _mean(weighted: Tensor, total: Tensor) -> Tensor:
    empty = (total == 0)[..., None]
    return (weighted / total[..., None].masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def _recurrent(s: Tensor, v: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
    """The definition."""
    m, u, w = state
    outs = []
    for s_k, v_k in zip(s.unbind(2), v.unbind(2), strict=True):
        before, m = m, torch.maximum(m, s_k.detach())
        kept, own = _weight(before, m), _weight(s_k, m)
        u = u * kept + own
        w = w * kept[..., None] + own[..., None] * v_k
        outs.append(_mean(w, u))
    return torch.stack(outs, dim=2), SoftmaxState(m, u, w)


def _merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state of the tokens of a and b together; associative."""
    m = torch.maximum(a.maximum, b.maximum)
    of_a, of_b = _weight(a.maximum, m), _weight(b.maximum, m)
    return SoftmaxState(
        m,
        a.total * of_a + b.total * of_b,
        a.weighted * of_a[..., None] + b.weighted * of_b[..., None],
    )


def _prefixes(x: SoftmaxState) -> SoftmaxState:
    """All prefixes along axis 2: of pairs by recursion, and of tokens between, joined to the pair before."""
    n = x.total.shape[2]
    if n == 1:
        return x
    even, odd = (SoftmaxState(*(t[:, :, start::2] for t in x)) for start in (0, 1))
    pairs = _prefixes(_merge(SoftmaxState(*(t[:, :, : n // 2] for t in even)), odd))
    between = _merge(
        SoftmaxState(*(t[:, :, : (n - 1) // 2] for t in pairs)), SoftmaxState(*(t[:, :, 1:] for t in even))
    )
    joined = []
    for first, later, paired in zip(even, between, pairs, strict=True):
        singles = torch.cat([first[:, :, :1], later], dim=2)
        whole = first.new_empty(*first.shape[:2], n, *first.shape[3:])
        index = torch.arange(n, device=first.device)
        joined.append(whole.index_copy(2, index[::2], singles).index_copy(2, index[1::2], paired))
    return SoftmaxState(*joined)


def _scan(s: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves (s_j, 1, v_j), their prefixes, and what was before joined to each."""
    seen = _weight(s, s.detach())  # 1, or 0 for a hidden token; carries the gradient of s
    leaves = SoftmaxState(s.detach(), seen, seen[..., None] * v)
    before = SoftmaxState(m.unsqueeze(2), u.unsqueeze(2), w.unsqueeze(2))
    m, u, w = _merge(before, _prefixes(leaves))
    return _mean(w, u), m[:, :, -1], u[:, :, -1], w[:, :, -1]


def _chunked(s: Tensor, v: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
    """Linear attention of width 1: queries 1, keys exp(s_k - m_k), decays m_(k-1) - m_k, normalised."""
    fixed = s.detach()
    m = torch.maximum(fixed.cummax(2).values, state.maximum[..., None])
    before = torch.cat([state.maximum[..., None], m[:, :, :-1]], dim=2)
    log_decay = torch.where(before == -math.inf, 0.0, before - m)  # nothing seen: nothing to lose
    key = _weight(s, m)[..., None]
    carried = torch.cat([state.weighted, state.total[..., None]], dim=-1)[:, :, None]
    out, carried = linear_attention(
        torch.ones_like(key), key, v, log_decay, normalize=True, state=carried, return_state=True
    )
    return out, SoftmaxState(m[:, :, -1], carried[:, :, 0, -1], carried[:, :, 0, :-1])
