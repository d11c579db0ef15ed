"""Kernels of the gated delta rule in chunks of C tokens, around those of linear attention.

With the state S before a chunk, since the decay from its start, A the strictly lower part of
beta_i (k_i . k_j) fade_ij and T = (1 + A)^-1, the writes of a chunk are
    u = T (beta v) - T (beta since k) S = fresh - erased S
and what is written is read as in linear attention with u for v. `solve` computes T, fresh and erased for all
chunks side by side; `write` and `write_back` walk over the chunks; `solve_gradient` is side by side again.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from heedful.ops.backends.triton.chunks import (
    TOKEN,
    across,
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
def _inverse(lower, local, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + lower)^-1 of a strictly lower triangular (C, C), blocks of twice the width at each level.

    Of two neighbouring blocks with inverses T1, T2 and the part B below: [[T1, 0], [-T2 B T1, T2]]. Powers of
    `lower` would need fewer steps, but grow and cancel where keys repeat.
    """
    own = tl.where(local[:, None] == local[None, :], 1.0, 0.0)
    T = own - tl.where(across(local, 1), lower, 0.0)
    for level in tl.static_range(1, LEVELS):
        below = dot(tl.where(across(local, 1 << level), lower, 0.0), T, None, PRECISION)
        T -= dot(T, below, None, PRECISION)
    return T


@triton.jit
@no_type_check
def solve(
    key,
    value,
    beta,
    decay,
    inverse,
    fresh,
    erased,
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
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    plane = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    line = plane.to(tl.int64) * n
    start = chunk * C
    local = tl.arange(0, C)
    key += b * stride_kb + h * stride_kh
    value += b * stride_vb + h * stride_vh
    decay += b * stride_gb + h * stride_gh
    rate = tl.load(beta + line + start + local, mask=start + local < n, other=0.0)[:, None]
    lower = tl.zeros([C, C], tl.float32)
    for part in range(0, D, ROWS):
        k = load_part(key, start, local, stride_kn, part + tl.arange(0, ROWS), n, D).to(WORK)
        lower = dot(k, tl.trans(k), lower, PRECISION)
    lower *= rate * fades(load_decay(decay, start, local, stride_gn, local, n, 0, D, TOKEN), local)
    T = _inverse(tl.where(local[:, None] > local[None, :], lower, 0.0), local, LEVELS, PRECISION).to(WORK)
    inverse += (plane.to(tl.int64) * chunks + chunk) * (C * C)
    tl.store(inverse + local[:, None] * C + local[None, :], T)
    for part in range(0, E, COLUMNS):
        column = part + tl.arange(0, COLUMNS)
        v = load_part(value, start, local, stride_vn, column, n, E)
        store_part(
            fresh + line * E, start, local, E, column, n, dot(T, (rate * v).to(WORK), None, PRECISION), E
        )
    rate *= since_start(decay, start, local, stride_gn, local, n, D, TOKEN)
    for part in range(0, D, ROWS):
        row = part + tl.arange(0, ROWS)
        k = load_part(key, start, local, stride_kn, row, n, D)
        store_part(
            erased + line * D, start, local, D, row, n, dot(T, (rate * k).to(WORK), None, PRECISION), D
        )


@triton.jit
@no_type_check
def write(
    key,
    decay,
    fresh,
    erased,
    first,
    kept,
    last,
    writes,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_gb,
    stride_gh,
    stride_gn,
    heads,
    n,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    PAD_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u and the S before every chunk, for some columns: S = exp(sum) S + (k exp(until))^T u."""
    RIGHT: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    plane = tl.program_id(0) // RIGHT
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    line, state = plane.to(tl.int64) * n, plane.to(tl.int64) * (D * E)
    row = tl.arange(0, PAD_D)
    column = (tl.program_id(0) % RIGHT) * COLUMNS + tl.arange(0, COLUMNS)
    local = tl.arange(0, C)
    key += b * stride_kb + h * stride_kh
    decay += b * stride_gb + h * stride_gh
    kept += state * chunks
    S = load_state(first + state, row, column, D, E)
    for chunk in range(chunks):
        start = chunk * C
        store_state(kept, row, column, S, D, E)
        kept += D * E
        u = load_part(fresh + line * E, start, local, E, column, n, E).to(tl.float32)
        w = load_part(erased + line * D, start, local, D, row, n, D)
        u -= dot(w, S.to(WORK), None, PRECISION)
        store_part(writes + line * E, start, local, E, column, n, u, E)
        k = load_part(key, start, local, stride_kn, row, n, D)
        k = (k * until_end(decay, start, local, stride_gn, row, n, D, TOKEN)).to(WORK)
        g = load_decay(decay, start, local, stride_gn, row, n, 0, D, TOKEN)
        S = dot(tl.trans(k), u.to(WORK), fade(S, g), PRECISION)
    store_state(last + state, row, column, S, D, E)


@triton.jit
@no_type_check
def write_back(
    query,
    key,
    decay,
    erased,
    grad,
    first,
    kept,
    last,
    dread,
    dwrites,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
    heads,
    n,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    PAD_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """du, from its own chunk (dread) and from later ones; dS after every chunk and before the first."""
    RIGHT: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    plane = tl.program_id(0) // RIGHT
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    line, state = plane.to(tl.int64) * n, plane.to(tl.int64) * (D * E)
    row = tl.arange(0, PAD_D)
    column = (tl.program_id(0) % RIGHT) * COLUMNS + tl.arange(0, COLUMNS)
    local = tl.arange(0, C)
    query += b * stride_qb + h * stride_qh
    key += b * stride_kb + h * stride_kh
    decay += b * stride_gb + h * stride_gh
    grad += b * stride_ob + h * stride_oh
    dS = load_state(first + state, row, column, D, E)
    for step in range(chunks):
        chunk = chunks - 1 - step
        start = chunk * C
        store_state(kept + state * chunks + chunk.to(tl.int64) * (D * E), row, column, dS, D, E)
        k = load_part(key, start, local, stride_kn, row, n, D)
        k = (k * until_end(decay, start, local, stride_gn, row, n, D, TOKEN)).to(WORK)
        du = load_part(dread + line * E, start, local, E, column, n, E).to(tl.float32)
        du = dot(k, dS.to(WORK), du, PRECISION)
        store_part(dwrites + line * E, start, local, E, column, n, du, E)
        g = load_decay(decay, start, local, stride_gn, row, n, 0, D, TOKEN)
        q = load_part(query, start, local, stride_qn, row, n, D)
        q = (q * tl.exp(tl.cumsum(g, 0))).to(WORK)
        do = load_part(grad, start, local, stride_on, column, n, E).to(WORK)
        dS = dot(tl.trans(q), do, fade(dS, g), PRECISION)
        w = load_part(erased + line * D, start, local, D, row, n, D)
        dS -= dot(tl.trans(w), du.to(WORK), None, PRECISION)
    store_state(last + state, row, column, dS, D, E)


@triton.jit
@no_type_check
def solve_gradient(
    key,
    value,
    beta,
    decay,
    inverse,
    writes,
    dwrites,
    before,
    dkey_read,
    dkey,
    dvalue,
    dbeta,
    ddecay,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    planes,
    heads,
    n,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From du those of v, beta, log_decay and, added to what came from reading, k; some channels a program.

    (1 + A) u = beta (v - since k S) =: right. So d right = T^T du =: r, and dA = -r u^T.
    """
    DOWN: tl.constexpr = (D + ROWS - 1) // ROWS
    plane = tl.program_id(0) // (chunks * DOWN)
    chunk = tl.program_id(0) // DOWN % chunks
    share = tl.program_id(0) % DOWN
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    line = plane.to(tl.int64) * n
    start = chunk * C
    local = tl.arange(0, C)
    inside = (start + local < n)[:, None]
    row = share * ROWS + tl.arange(0, ROWS)
    key += b * stride_kb + h * stride_kh
    value += b * stride_vb + h * stride_vh
    decay += b * stride_gb + h * stride_gh
    state = (plane.to(tl.int64) * chunks + chunk) * (D * E)
    rate = tl.load(beta + line + start + local[:, None], mask=inside, other=0.0)
    place = (plane.to(tl.int64) * chunks + chunk) * (C * C) + local[:, None] * C + local[None, :]
    turned = tl.trans(tl.load(inverse + place))
    dlower = tl.zeros([C, C], tl.float32)
    from_state = tl.zeros([C, ROWS], tl.float32)  # r S^T
    drate = tl.zeros([C, 1], tl.float32)
    for part in range(0, E, COLUMNS):
        column = part + tl.arange(0, COLUMNS)
        du = load_part(dwrites + line * E, start, local, E, column, n, E)
        r = dot(turned, du, None, PRECISION)
        u = load_part(writes + line * E, start, local, E, column, n, E)
        dlower -= dot(r.to(WORK), tl.trans(u), None, PRECISION)
        S = load_state(before + state, row, column, D, E)
        from_state = dot(r.to(WORK), tl.trans(S), from_state, PRECISION)
        if share == 0:
            v = load_part(value, start, local, stride_vn, column, n, E).to(tl.float32)
            drate += tl.sum(r * v, 1)[:, None]
            store_part(dvalue + line * E, start, local, E, column, n, rate * r, E)
    k = load_part(key, start, local, stride_kn, row, n, D).to(WORK)
    since = since_start(decay, start, local, stride_gn, row, n, D, TOKEN)
    fade = fades(load_decay(decay, start, local, stride_gn, row, n, 0, D, TOKEN), local)
    dlower = tl.where(local[:, None] > local[None, :], dlower, 0.0) * fade
    alike = dot(k, tl.trans(k), None, PRECISION)
    erased = since * tl.sum(k * from_state, 1)[:, None]
    drate += tl.sum(dlower * alike, 1)[:, None] - erased
    dlower *= rate
    dg = fade_gradient(dlower * alike, local) - tl.cumsum(rate * erased, 0, reverse=True)
    dk = load_part(dkey_read + line * D, start, local, D, row, n, D) - rate * since * from_state
    both = dlower + tl.trans(dlower)
    dk = dot(both.to(WORK), k, dk, PRECISION)
    store_part(dkey + line * D, start, local, D, row, n, dk, D)
    place = (share * planes + plane).to(tl.int64) * n + start + local[:, None]
    tl.store(dbeta + place, drate, mask=inside)
    tl.store(ddecay + place, dg, mask=inside)
