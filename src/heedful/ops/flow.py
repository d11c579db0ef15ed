"""Flow attention: linear attention as a network whose sources and sinks conserve what flows through them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.checks import check_choice, check_mask
from heedful.ops.linear import FORMS, linear_attention
from heedful.ops.precision import no_autocast
from heedful.ops.segments import in_segments, segment_sizes
from heedful.registry import register

SEGMENT = 1024  # tokens between two states that wait for the backward pass


class FlowState(NamedTuple):
    """Sums over the tokens seen, with the names of the op: q, k features, I, O flows."""

    number: Float[Tensor, " b"]  # visible tokens
    query: Float[Tensor, "b h d"]  # q
    key: Float[Tensor, "b h d"]  # k
    incoming: Float[Tensor, "b h d"]  # q I
    outgoing: Float[Tensor, "b h d"]  # k O
    competition: Float[Tensor, "b h"]  # exp(co)
    matrix: Float[Tensor, "b h d e"]  # k^T (v comp)


@register("flow-attention", kind="op", paper="flowformer", tags=("linear", "decode"), complexity="O(N D E)")
def flow_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    *,
    causal: bool = False,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
    eps: float = 1e-6,
    state: FlowState | None = None,
    return_state: bool = False,
    form: str = "auto",
) -> Float[Tensor, "b h n e"] | tuple[Float[Tensor, "b h n e"], FlowState]:
    """Attention without softmax in which sources (values) compete and sinks (results) are gated.

        q = sigmoid(query), k = sigmoid(key), and eps is added to every component of a factor of a dot product
        I_i = 1 / (q_i . sum_j k_j),          O_j = 1 / (k_j . sum_i q_i)
        cs_i = q_i . sum_j k_j O_j,           co_j = k_j . sum_i q_i I_i, clamped to [-1, 1]
        alloc_i = sigmoid(cs_i n / m),        comp_j = m softmax_j(co_j)
        o_i = alloc_i I_i q_i sum_j k_j^T comp_j v_j

    Causal: the sums are over the tokens up to i or j, and with their number c in place of n and m
        I_i = c_i / (...), O_j = c_j / (...), cs_i = ... / c_i, co_j = ... / c_j
        alloc_i = sigmoid(cs_i),  comp_j = c_j exp(co_j) / sum_(l <= j) exp(co_l)
        o_i = alloc_i I_i / c_i q_i sum_(j <= i) k_j^T comp_j v_j
    so what a source won when it came is not changed by later ones. Nothing is scaled by sqrt(d).

    query         (b, h, n, d)
    key, value    (b, h, m, d), (b, h, m, e); causal: m = n
    query_mask    (b, n), True = a sink; causal: must be None, key_mask is for both
    key_mask      (b, m), True = a source. What is masked is in no sum and in no number
    state         causal: the sums over the tokens before; zeros if None
    return_state  causal: also give the sums after the last token
    form          causal: how the sum of k^T comp v is formed, as in `linear_attention`

    No visible source gives zeros. Sums and state are float32, or float64 if any input is; the output has
    the dtype of query. Backward of the causal form keeps one state for every 1024 tokens and computes the
    rest again.
    Raises ValueError if shapes do not fit, and where an argument does not go with `causal`.
    Source: Flowformer, arXiv 2202.06258.
    """
    _check(query, key, value, causal, query_mask, key_mask, state, return_state, form)
    given = (query, key, value) if state is None else (query, key, value, *state)
    work = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32

    with no_autocast(query):
        if causal:
            query_mask = key_mask
        q, k = (_features(x, mask, work) for x, mask in ((query, query_mask), (key, key_mask)))
        sinks, sources = (_visible(x, mask, work) for x, mask in ((query, query_mask), (key, key_mask)))
        if causal:
            sums = _zeros(q, value) if state is None else FlowState(*(t.to(work) for t in state))
            tokens = (q, k, value.to(work), sources)

            def run(*given: Tensor) -> tuple[Tensor, ...]:
                q, k, v, seen, *before = given
                out, after = _causal(q, k, v, seen, FlowState(*before), eps, form)
                return (out, *after)

            if q.shape[2]:
                sizes = segment_sizes(q.shape[2], segment=SEGMENT, chunk=SEGMENT)
                out, *last = in_segments(run, tokens, sums, sizes=sizes, keep=SEGMENT)
                sums = FlowState(*last)
            else:
                out = tokens[2]
        else:
            out = _full(q, k, value.to(work), sinks, sources, eps)
        out = out.to(query.dtype)
    return (out, sums) if return_state else out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    state: FlowState | None,
    return_state: bool,
    form: str,
) -> None:
    check_choice("form", form, FORMS)
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, must be (b, h, n, d)")
    b, h, n, d = query.shape
    m = n if causal or key.ndim != 4 else key.shape[2]
    if key.shape != (b, h, m, d):
        raise ValueError(f"key has shape {tuple(key.shape)}, must be {(b, h, m, d)}")
    if value.ndim != 4 or value.shape[:3] != (b, h, m):
        raise ValueError(f"value has shape {tuple(value.shape)}, must be ({b}, {h}, {m}, e)")
    check_mask("query_mask", query_mask, b, n)
    check_mask("key_mask", key_mask, b, m)
    if causal and query_mask is not None:
        raise ValueError("query_mask is given, must be None with causal=True: key_mask is for both")
    if not causal and (state is not None or return_state):
        name = "return_state" if state is None else "state"
        raise ValueError(f"{name} is given, must not be with causal=False: later tokens change earlier ones")
    if state is not None:
        e = value.shape[-1]
        wanted = [(b,), *[(b, h, d)] * 4, (b, h), (b, h, d, e)]
        if [tuple(t.shape) for t in state] != wanted:
            raise ValueError(f"state has shapes {[tuple(t.shape) for t in state]}, must be {wanted}")


def _features(x: Tensor, mask: Tensor | None, work: torch.dtype) -> Tensor:
    x = x.to(work).sigmoid()
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)


def _visible(x: Tensor, mask: Tensor | None, work: torch.dtype) -> Tensor:
    """(b, 1, n, 1): 1 where a token is visible, 0 elsewhere."""
    if mask is None:
        return x.new_ones(x.shape[0], 1, x.shape[2], 1, dtype=work)
    return mask[:, None, :, None].to(work)


def _zeros(q: Tensor, value: Tensor) -> FlowState:
    b, h, _, d = q.shape
    none = q.new_zeros(b, h, d)
    return FlowState(
        q.new_zeros(b), none, none, none, none, q.new_zeros(b, h), q.new_zeros(b, h, d, value.shape[-1])
    )


def _dot(x: Tensor, y: Tensor, eps: float) -> Tensor:
    return ((x + eps) * (y + eps)).sum(-1, keepdim=True)


def _full(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, sources: Tensor, eps: float) -> Tensor:
    # At least 1, because nothing may be visible.
    n, m = (seen.sum(2, keepdim=True).clamp_min(1.0) for seen in (sinks, sources))
    incoming = 1 / _dot(q, k.sum(2, keepdim=True), eps)
    outgoing = 1 / _dot(k, q.sum(2, keepdim=True), eps)
    sink = _dot(q, (k * outgoing).sum(2, keepdim=True), eps)
    source = _dot(k, (q * incoming).sum(2, keepdim=True), eps).clamp(-1.0, 1.0)
    allocation = (sink * n / m).sigmoid()
    won = source.exp() * sources
    competition = won / _positive(won.sum(2, keepdim=True)) * m
    return (q * incoming) @ (k.mT @ (v * competition)) * allocation


def _causal(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, before: FlowState, eps: float, form: str
) -> tuple[Tensor, FlowState]:
    def running(x: Tensor, start: Tensor) -> Tensor:
        return start.unsqueeze(2) + x.cumsum(2)

    number = running(seen, before.number[:, None, None])
    c = number.clamp_min(1.0)
    keys, queries = running(k, before.key), running(q, before.query)
    incoming = c / _dot(q, keys, eps)
    outgoing = c / _dot(k, queries, eps)
    into, out_of = running(q * incoming, before.incoming), running(k * outgoing, before.outgoing)
    sink = _dot(q, out_of, eps) / c
    source = (_dot(k, into, eps) / c).clamp(-1.0, 1.0)
    allocation = sink.sigmoid()
    won = source.exp() * seen
    rivals = running(won, before.competition[..., None])
    competition = won / _positive(rivals) * c
    out, matrix = linear_attention(
        q * incoming / c, k, v * competition, state=before.matrix, return_state=True, form=form
    )
    after = FlowState(
        number[:, 0, -1, 0],
        queries[:, :, -1],
        keys[:, :, -1],
        into[:, :, -1],
        out_of[:, :, -1],
        rivals[:, :, -1, 0],
        matrix,
    )
    return out * allocation, after


def _positive(total: Tensor) -> Tensor:
    """A sum of exp(co) is at least exp(-1), unless nothing is visible: then it divides zeros only."""
    return total.clamp_min(0.1)
