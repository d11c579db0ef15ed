"""Kernels of S_t = exp(g_t) S_(t-1) + k_t^T v_t, o_t = q_t S_t, in chunks of C tokens.

`states` walks over the chunks of a sequence and keeps the state before each; `mix` and `gradients` compute
all chunks side by side. Backward is the same recurrence from the last token to the first, so that `states`
and `mix` serve both ways. A plane is a head of a batch row.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from heedful.ops.backends.triton.chunks import (
    CHANNEL,
    channel_gradients,
    channel_scores,
    fade,
    fade_gradient,
    fades,
    load_decay,
    load_part,
    load_state,
    since_start,
    store_part,
    store_state,
    until_end,
)
from heedful.ops.backends.triton.tiles import dot


@triton.jit
@no_type_check
def states(
    key,
    value,
    decay,
    first,
    kept,
    last,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    heads,
    n,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BACK: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S before every chunk from the keys and values, and after the last one.

    BACK: the gradient of S after every chunk from the queries and the gradients of the outputs, and before
    the first one.
    """
    DOWN: tl.constexpr = (D + ROWS - 1) // ROWS
    RIGHT: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    plane = tl.program_id(0) // (DOWN * RIGHT)
    tile = tl.program_id(0) % (DOWN * RIGHT)
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    row = (tile // RIGHT) * ROWS + tl.arange(0, ROWS)
    column = (tile % RIGHT) * COLUMNS + tl.arange(0, COLUMNS)
    local = tl.arange(0, C)
    key += b * stride_kb + h * stride_kh
    value += b * stride_vb + h * stride_vh
    decay += b * stride_gb + h * stride_gh
    kept += plane.to(tl.int64) * chunks * (D * E)
    S = load_state(first + plane.to(tl.int64) * (D * E), row, column, D, E)
    for step in range(chunks):
        chunk = step
        if BACK:
            chunk = chunks - 1 - step
        start = chunk * C
        store_state(kept + chunk.to(tl.int64) * (D * E), row, column, S, D, E)
        k = load_part(key, start, local, stride_kn, row, n, D)
        v = load_part(value, start, local, stride_vn, column, n, E).to(WORK)
        g = load_decay(decay, start, local, stride_gn, row, n, 0, D, KIND)
        if BACK:
            k = k * tl.exp(tl.cumsum(g, 0))
        else:
            k = k * until_end(decay, start, local, stride_gn, row, n, D, KIND)
        S = dot(tl.trans(k.to(WORK)), v, fade(S, g), PRECISION)
    store_state(last + plane.to(tl.int64) * (D * E), row, column, S, D, E)


@triton.jit
@no_type_check
def mix(
    query,
    key,
    value,
    decay,
    kept,
    out,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    heads,
    n,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BACK: tl.constexpr,
    INTER: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o_i = sum_(j <= i) A_ij v_j + exp(since_i) q_i S with A the decayed scores of a chunk.

    BACK: from the gradients of o those of v, sum_(i >= j) A_ij v_i + exp(until_j) k_j S. INTER: with S.
    """
    RIGHT: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    plane = tl.program_id(0) // (chunks * RIGHT)
    chunk = tl.program_id(0) // RIGHT % chunks
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    start = chunk * C
    local = tl.arange(0, C)
    column = (tl.program_id(0) % RIGHT) * COLUMNS + tl.arange(0, COLUMNS)
    query += b * stride_qb + h * stride_qh
    key += b * stride_kb + h * stride_kh
    value += b * stride_vb + h * stride_vh
    decay += b * stride_gb + h * stride_gh
    kept += (plane.to(tl.int64) * chunks + chunk) * (D * E)
    scores = tl.zeros([C, C], tl.float32)
    mixed = tl.zeros([C, COLUMNS], tl.float32)
    for part in range(0, D, ROWS):
        row = part + tl.arange(0, ROWS)
        q = load_part(query, start, local, stride_qn, row, n, D).to(WORK)
        k = load_part(key, start, local, stride_kn, row, n, D).to(WORK)
        if KIND == CHANNEL:
            scores += channel_scores(q, k, decay, start, local, stride_gn, row, n, D, LEVELS, PRECISION)
        else:
            scores = dot(q, tl.trans(k), scores, PRECISION)
        if INTER:
            if BACK:
                x = k * until_end(decay, start, local, stride_gn, row, n, D, KIND)
            else:
                x = q * since_start(decay, start, local, stride_gn, row, n, D, KIND)
            mixed = dot(x.to(WORK), load_state(kept, row, column, D, E), mixed, PRECISION)
    if KIND != CHANNEL:
        scores *= fades(load_decay(decay, start, local, stride_gn, local, n, 0, D, KIND), local)
    if BACK:
        scores = tl.trans(scores)
    v = load_part(value, start, local, stride_vn, column, n, E).to(WORK)
    mixed = dot(scores.to(WORK), v, mixed, PRECISION)
    store_part(out + plane.to(tl.int64) * n * E, start, local, E, column, n, mixed, E)


@triton.jit
@no_type_check
def gradients(
    query,
    key,
    value,
    decay,
    grad,
    before,
    dafter,
    dquery,
    dkey,
    ddecay,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
    planes,
    heads,
    n,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    DECAY: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of some channels of q and k and, with DECAY, of log_decay: of a token (each program its
    channels' share, (d / ROWS, plane, n)), or of those channels."""
    DOWN: tl.constexpr = (D + ROWS - 1) // ROWS
    plane = tl.program_id(0) // (chunks * DOWN)
    chunk = tl.program_id(0) // DOWN % chunks
    share = tl.program_id(0) % DOWN
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    start = chunk * C
    local = tl.arange(0, C)
    row = share * ROWS + tl.arange(0, ROWS)
    query += b * stride_qb + h * stride_qh
    key += b * stride_kb + h * stride_kh
    value += b * stride_vb + h * stride_vh
    decay += b * stride_gb + h * stride_gh
    grad += b * stride_ob + h * stride_oh
    state = (plane.to(tl.int64) * chunks + chunk) * (D * E)
    dscores = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, ROWS], tl.float32)
    dk = tl.zeros([C, ROWS], tl.float32)
    passed = tl.zeros([ROWS], tl.float32)
    for part in range(0, E, COLUMNS):
        column = part + tl.arange(0, COLUMNS)
        v = load_part(value, start, local, stride_vn, column, n, E).to(WORK)
        do = load_part(grad, start, local, stride_on, column, n, E).to(WORK)
        S = load_state(before + state, row, column, D, E)
        dS = load_state(dafter + state, row, column, D, E)
        dscores = dot(do, tl.trans(v), dscores, PRECISION)
        dq = dot(do, tl.trans(S), dq, PRECISION)
        dk = dot(v, tl.trans(dS), dk, PRECISION)
        if DECAY:
            passed += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    q = load_part(query, start, local, stride_qn, row, n, D).to(WORK)
    k = load_part(key, start, local, stride_kn, row, n, D).to(WORK)
    dq *= since_start(decay, start, local, stride_gn, row, n, D, KIND)
    dk *= until_end(decay, start, local, stride_gn, row, n, D, KIND)
    g = load_decay(decay, start, local, stride_gn, row, n, 0, D, KIND)
    dg = dq
    if DECAY:
        # The decay at token l stands between the state and the queries from l on, and between the keys
        # before l and the next state.
        to_queries, from_keys = q * dq, k * dk
        through = (tl.exp(tl.sum(g, 0)) * passed)[None, :]
        if KIND != CHANNEL:
            to_queries, from_keys = tl.sum(to_queries, 1)[:, None], tl.sum(from_keys, 1)[:, None]
            through = tl.sum(through, 1)[:, None]
        dg = tl.cumsum(to_queries, 0, reverse=True) + tl.cumsum(from_keys, 0) - from_keys + through
    if KIND == CHANNEL:
        causal = tl.where(local[:, None] >= local[None, :], dscores, 0.0)
        one, other, between = channel_gradients(
            q, k, causal, decay, start, local, stride_gn, row, n, D, LEVELS, PRECISION
        )
        dq += one
        dk += other
        if DECAY:
            dg += between
            store_part(ddecay + plane.to(tl.int64) * n * D, start, local, D, row, n, dg, D)
    else:
        dscores *= fades(g, local)
        dq = dot(dscores.to(WORK), k, dq, PRECISION)
        dk = dot(tl.trans(dscores.to(WORK)), q, dk, PRECISION)
        if DECAY:
            dg += fade_gradient(dscores * dot(q, tl.trans(k), None, PRECISION), local)
            ddecay += (share * planes + plane).to(tl.int64) * n
            tl.store(ddecay + start + local[:, None], dg, mask=(start + local < n)[:, None])
    store_part(dquery + plane.to(tl.int64) * n * D, start, local, D, row, n, dq, D)
    store_part(dkey + plane.to(tl.int64) * n * D, start, local, D, row, n, dk, D)
