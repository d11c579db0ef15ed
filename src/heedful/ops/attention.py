"""`heedful.attention`: one operator for every pattern, on every device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heedful.checks import check_choice
from heedful.ops.backends import flex, reference, sdpa, tiled, triton
from heedful.ops.bias import FactoredBias
from heedful.ops.call import Call, Selection
from heedful.ops.observe import changed, note
from heedful.patterns.causal import Causal
from heedful.patterns.full import Full
from heedful.patterns.pattern import Pattern
from heedful.selection import BlockTable, TokenGroups

BACKENDS = {"reference": reference, "sdpa": sdpa, "tiled": tiled, "flex": flex, "triton": triton}
_WARN, _REFUSE = 1 << 26, 1 << 30  # logits held by a dense computation
_SMALL = 1 << 18  # n x m up to which a dense mask is cheaper than walking over blocks


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Any
) -> Tensor: ...


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(  # type: ignore[misc]  # the overloads name only what changes the result's type
    query: Float[Tensor, "b hq n d"],
    key: Float[Tensor, "b hkv m d"],
    value: Float[Tensor, "b hkv m e"],
    *,
    pattern: Selection | None = None,
    bias: Float[Tensor, "..."] | FactoredBias | None = None,
    scale: float | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
    sink_logits: Float[Tensor, " hq"] | None = None,
    query_offset: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b hq n e"] | tuple[Float[Tensor, "b hq n e"], Float[Tensor, "b hq n"]]:
    """Softmax attention over the visible keys: out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j.

    query, key, value: hkv divides hq (consecutive query heads share a KV head); d and e may differ.
    pattern: a `heedful.patterns` pattern, a `BlockTable` or `TokenGroups`; None: all keys are visible.
    bias: added after scaling; a tensor that broadcasts to (b, hq, n, m), or a `FactoredBias`.
    scale: defaults to d ** -0.5.
    key_mask: True = may be seen.
    sink_logits: one extra logit a head that takes weight and gives nothing.
    query_offset: the key position of query 0; defaults to m - n, so that decoding needs nothing special.
    return_lse: also the natural log-sum-exp of the logits, (b, hq, n), differentiable.
    backend: how, never what: "reference", "sdpa", "tiled", "flex", "triton", or "auto", the fastest that
    serves.
    A row that sees nothing gives zeros and lse -inf. Raises ValueError on shapes that do not fit, and
    where a dense computation would hold more than 2^30 logits (above 2^26 it warns).
    """
    check_choice("backend", backend, ("auto", *BACKENDS))
    call = _door(
        query, key, value, pattern, bias, scale, key_mask, sink_logits, query_offset, dropout_p, return_lse
    )
    note(call)
    name = _choose(call) if backend == "auto" else backend
    chosen = BACKENDS[name]
    reason = chosen.unsupported(call)
    if reason is not None:
        raise ValueError(f"backend {name!r} {reason}; backend='auto' takes one that serves")
    if name == "reference" or (name == "sdpa" and sdpa.holds_scores(call)):
        _watch_size(call, name)
    out, lse = chosen.run(call)
    out = changed(call, out)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def merge_partials(
    parts: Sequence[tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]],
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """Join attention over disjoint sets of keys, exactly: out = sum_p exp(lse_p - lse) out_p.

    parts: (out, lse) pairs as `attention(..., return_lse=True)` gives them. Gradients pass through both.
    A row that sees nothing in any part gives zeros and lse = -inf.
    """
    if not parts:
        raise ValueError("parts is empty, must hold at least one (out, lse) pair")
    outs, lses = zip(*parts, strict=True)
    stacked = torch.stack(lses)
    top = stacked.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (stacked - top).exp()
    total = weights.sum(0)
    share = weights / total.masked_fill(total == 0, 1.0)
    out = sum(s[..., None] * o for s, o in zip(share, outs, strict=True))
    # log(0) has an infinite slope; rows that see nothing are kept out of it.
    lse = torch.where(total == 0, -torch.inf, top + total.masked_fill(total == 0, 1.0).log())
    return out.to(outs[0].dtype), lse  # type: ignore[union-attr]


def _door(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Selection | None,
    bias: Tensor | FactoredBias | None,
    scale: float | None,
    key_mask: Tensor | None,
    sink_logits: Tensor | None,
    query_offset: int | None,
    dropout_p: float,
    return_lse: bool,
) -> Call:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must be (batch, heads, tokens, width)")
        if x.dtype != query.dtype or not x.is_floating_point():
            raise ValueError(
                f"{name} has dtype {x.dtype}, must be floating and the same as query's {query.dtype}"
            )
    b, hq, n, d = query.shape
    hkv, m = key.shape[1:3]
    if key.shape[0] != b or key.shape[3] != d:
        raise ValueError(f"key has shape {tuple(key.shape)}, must be ({b}, heads, m, {d}) to fit query")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value has shape {tuple(value.shape)}, must begin with {tuple(key.shape[:3])} as key"
        )
    if hkv == 0 or hq % hkv:
        raise ValueError(f"key has {hkv} heads, must divide query's {hq}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (b, m)):
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)} and dtype {key_mask.dtype}, "
            f"must be bool of shape ({b}, {m}), True = may be seen"
        )
    if sink_logits is not None and sink_logits.shape != (hq,):
        raise ValueError(
            f"sink_logits has shape {tuple(sink_logits.shape)}, must be ({hq},), one a query head"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, must lie in [0, 1)")
    offset = m - n if query_offset is None else query_offset
    if isinstance(bias, FactoredBias):
        got = (bias.query.shape[2], bias.key.shape[2])
        if got != (n, m):
            raise ValueError(
                f"bias has factors for {got[0]} queries and {got[1]} keys, must be for {n} and {m}"
            )
    elif bias is not None:
        try:
            fits = torch.broadcast_shapes(bias.shape, (b, hq, n, m)) == (b, hq, n, m)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, must broadcast to {(b, hq, n, m)}")
        bias = bias.view((1,) * (4 - bias.ndim) + tuple(bias.shape))
    if isinstance(pattern, Pattern):
        pattern.check(n, m, offset)
        _check_leading("pattern", pattern.batch, pattern.heads, b, hq)
        if isinstance(pattern, Full):
            pattern = None
    elif pattern is not None:
        if pattern.shape != (n, m):
            raise ValueError(f"pattern is for {pattern.shape} queries and keys, must be for {(n, m)}")
        leading = pattern.count.shape if isinstance(pattern, BlockTable) else pattern.query_index.shape
        _check_leading("pattern", leading[0], leading[1], b, hq)
        if (
            isinstance(pattern, TokenGroups)
            and pattern.query_weight is not None
            and (return_lse or sink_logits is not None)
        ):
            raise ValueError(
                "pattern has query_weight: its several softmaxes have no common lse and no common sink"
            )
    scale = d**-0.5 if scale is None else float(scale)
    return Call(
        query, key, value, pattern, bias, scale, key_mask, sink_logits, offset, float(dropout_p), return_lse
    )


def _check_leading(name: str, batch: int, heads: int, b: int, h: int) -> None:
    if batch not in (1, b) or heads not in (1, h):
        raise ValueError(
            f"{name} is for {batch} batch rows and {heads} heads, must be for 1 or {b}, and 1 or {h}"
        )


def _choose(call: Call) -> str:
    """The fastest backend that serves this call."""
    small = call.n * call.m <= _SMALL
    if call.query.numel() == 0 or call.m == 0:
        return "reference"
    pattern = call.selection
    if isinstance(pattern, BlockTable | TokenGroups):
        if small and torch.compiler.is_compiling():
            return "reference"  # one traceable graph
        return _sparse(call)
    dense = pattern is None or (isinstance(pattern, Causal) and call.n == call.m)
    if sdpa.unsupported(call) is None and (small or (dense and not sdpa.holds_scores(call))):
        return "sdpa"
    if small:
        return "reference"
    return _sparse(call)


def _sparse(call: Call) -> str:
    """The fastest backend that leaves out what is hidden."""
    if not call.query.is_cuda:
        return "tiled"
    # FlexAttention stays in the graph of torch.compile; the Triton kernels break it.
    order = ("flex", "triton") if torch.compiler.is_compiling() else ("triton", "flex")
    for name in order:
        if BACKENDS[name].unsupported(call) is None and (name == "flex" or triton.suits(call.query.device)):
            return name
    return "tiled"


def _watch_size(call: Call, name: str) -> None:
    if call.scores > _REFUSE:
        raise ValueError(
            f"backend {name!r} would hold {call.scores:,} logits, more than 2^30; backend='tiled' holds none"
        )
    if call.scores > _WARN:
        warnings.warn(
            f"heedful.attention: backend {name!r} holds {call.scores:,} logits; backend='tiled' holds none",
            stacklevel=3,
        )
