"""What the kernels of linear recurrences share: parts of matrices, and decays between the tokens of a chunk.

A decay is a sum of log_decay over the tokens between, never a difference of two sums: all exponents are
<= 0, -inf does no harm, and a slow decay after a fast one is not lost to rounding. `g` is a tile of the
log_decay of a chunk, (C, 1), or (C, width) where channels decay apart.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from heedful.ops.backends.triton.tiles import dot

# How log_decay is given.
HEAD, TOKEN, CHANNEL = (tl.constexpr(kind) for kind in range(3))


@triton.jit
@no_type_check
def load_part(base, start, local, stride, column, n, WIDTH: tl.constexpr):
    """Tokens start + local and some columns of an (n, WIDTH) matrix, zeros past its ends."""
    pointers = base + start.to(tl.int64) * stride + local[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=(start + local < n)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
@no_type_check
def store_part(base, start, local, stride, column, n, part, WIDTH: tl.constexpr):
    pointers = base + start.to(tl.int64) * stride + local[:, None] * stride + column[None, :]
    inside = (start + local < n)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointers, part.to(base.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def load_state(base, row, column, D: tl.constexpr, E: tl.constexpr):
    """Some rows and columns of a contiguous (D, E) matrix, zeros past its ends."""
    inside = (row < D)[:, None] & (column < E)[None, :]
    return tl.load(base + row[:, None] * E + column[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_state(base, row, column, state, D: tl.constexpr, E: tl.constexpr):
    inside = (row < D)[:, None] & (column < E)[None, :]
    tl.store(base + row[:, None] * E + column[None, :], state.to(base.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def load_decay(
    base, start, local, stride, column, n, AHEAD: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr
):
    """log_decay of the tokens AHEAD of a chunk's tokens, 0 for those behind the chunk or the sequence."""
    C: tl.constexpr = local.shape[0]
    inside = ((local + AHEAD < C) & (start + local + AHEAD < n))[:, None]
    if KIND == HEAD:
        g = tl.where(inside, tl.load(base).to(tl.float32), 0.0)
    else:
        pointers = base + start.to(tl.int64) * stride + (local[:, None] + AHEAD) * stride
        if KIND == CHANNEL:
            pointers += column[None, :]
            inside = inside & (column < D)[None, :]
        g = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return g


@triton.jit
@no_type_check
def since_start(base, start, local, stride, column, n, D: tl.constexpr, KIND: tl.constexpr):
    """What is left at each token of what came into the chunk."""
    return tl.exp(tl.cumsum(load_decay(base, start, local, stride, column, n, 0, D, KIND), 0))


@triton.jit
@no_type_check
def until_end(base, start, local, stride, column, n, D: tl.constexpr, KIND: tl.constexpr):
    """What is left of each token at the chunk's end."""
    ahead = load_decay(base, start, local, stride, column, n, 1, D, KIND)
    return tl.exp(tl.cumsum(ahead, 0, reverse=True))


@triton.jit
@no_type_check
def fade(S, g):
    """A state S (width, columns) at the end of a chunk, of what came into it.

    exp is 1 or 0 and the rest: a state that loses 1e-7 a chunk would lose 1.2e-7 or nothing with a rounded
    exp, chunk after chunk.
    """
    total = tl.sum(g, 0)[:, None]
    slow = total > -0.1
    # exp(total) - 1 to float32's precision
    little = total * (1 + total / 2 * (1 + total / 3 * (1 + total / 4 * (1 + total / 5))))
    return tl.where(slow, S, 0.0) + tl.where(slow, little, tl.exp(total)) * S


@triton.jit
@no_type_check
def fades(g, local):
    """(C, 1) to (C, C): what is left at token i of token j <= i, 0 for j > i."""
    i, j = local[:, None], local[None, :]
    between = tl.cumsum(tl.where(i > j, g, 0.0), 0)
    return tl.where(i >= j, tl.exp(between), 0.0)


@triton.jit
@no_type_check
def fade_gradient(weight, local):
    """From the gradients of the logarithms of all fades (C, C) that of log_decay, (C, 1)."""
    i, j = local[:, None], local[None, :]
    later = tl.cumsum(tl.where(i > j, weight, 0.0), 0, reverse=True)
    return tl.sum(tl.where(i > j, later, 0.0), 1)[:, None]


@triton.jit
@no_type_check
def halves(base, start, local, stride, column, n, D: tl.constexpr, WIDTH: tl.constexpr):
    """For blocks of WIDTH tokens: what is left since a block's start at each token, and until its end."""
    C: tl.constexpr = local.shape[0]
    PAD: tl.constexpr = column.shape[0]
    g = load_decay(base, start, local, stride, column, n, 0, D, CHANNEL)
    ahead = load_decay(base, start, local, stride, column, n, 1, D, CHANNEL)
    ahead = tl.where((local % WIDTH == WIDTH - 1)[:, None], 0.0, ahead)
    since, until = g, ahead
    if WIDTH > 1:
        since = in_blocks(g, C // WIDTH, WIDTH, PAD, False)
        until = in_blocks(ahead, C // WIDTH, WIDTH, PAD, True)
    return tl.exp(since), tl.exp(until)


@triton.jit
@no_type_check
def in_blocks(x, COUNT: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, REVERSE: tl.constexpr):
    """Cumulated sums of (C, PAD) over tokens, block by block."""
    sums = tl.cumsum(tl.reshape(x, (COUNT, WIDTH, PAD)), 1, reverse=REVERSE)
    return tl.reshape(sums, (COUNT * WIDTH, PAD))


@triton.jit
@no_type_check
def across(local, WIDTH: tl.constexpr):
    """(C, C): query i and key j are in neighbouring blocks of WIDTH, the key in the first of two."""
    i, j = local[:, None] // WIDTH, local[None, :] // WIDTH
    return (i == j + 1) & (j % 2 == 0)


@triton.jit
@no_type_check
def channel_scores(
    q,
    k,
    base,
    start,
    local,
    stride,
    column,
    n,
    D: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(C, C): sum_c q_ic k_jc exp(sum of g_lc over j < l <= i) of the channels of a tile, for j <= i.

    Two neighbouring blocks become one of twice the width; the exponent of a pair across splits at their
    border into two sums <= 0.
    """
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    scores = tl.where(local[:, None] == local[None, :], own[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        since, until = halves(base, start, local, stride, column, n, D, 1 << level)
        pairs = dot((q * since).to(q.dtype), tl.trans((k * until).to(k.dtype)), None, PRECISION)
        scores += tl.where(across(local, 1 << level), pairs, 0.0)
    return scores


@triton.jit
@no_type_check
def channel_gradients(
    q,
    k,
    dscores,
    base,
    start,
    local,
    stride,
    column,
    n,
    D: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of `channel_scores` in q, k and log_decay, each (C, width)."""
    C: tl.constexpr = local.shape[0]
    PAD: tl.constexpr = column.shape[0]
    own = tl.sum(tl.where(local[:, None] == local[None, :], dscores, 0.0), 1)[:, None]
    dq, dk = own * k, own * q
    dg = tl.zeros([C, PAD], tl.float32)
    for level in tl.static_range(LEVELS):
        since, until = halves(base, start, local, stride, column, n, D, 1 << level)
        pairs = tl.where(across(local, 1 << level), dscores, 0.0).to(q.dtype)
        one = dot(pairs, (k * until).to(k.dtype), None, PRECISION) * since
        other = dot(tl.trans(pairs), (q * since).to(q.dtype), None, PRECISION) * until
        dq += one
        dk += other
        one, other = one * q, other * k
        if level == 0:
            dg += one
        else:
            dg += in_blocks(one, C >> level, 1 << level, PAD, True)
            dg += in_blocks(other, C >> level, 1 << level, PAD, False) - other
    return dq, dk, dg
