"""Kernels of the selective scan.

    h_t = exp(step_t A) h_(t-1) + step_t u_t B_t,    y_t = (C_t . h_t + D u_t) silu(z_t)

Tokens come in chunks of T, channels in blocks. `ends` gives what each chunk adds to the state, `join` the
states between chunks, and `outputs` and `gradients` run all chunks side by side from there, each as a scan
over a (T, channels, s) tile. Exponents are sums of step A, all <= 0, and no quotients are formed.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _after(decay1, added1, decay2, added2):
    """One step after another: h -> decay2 (decay1 h + added1) + added2."""
    return decay1 * decay2, decay2 * added1 + added2


@triton.jit
@no_type_check
def _load_tokens(base, token, channel, stride, inside):
    """(T, channels) in float32 of a matrix (channels, n)."""
    pointers = base + channel[None, :].to(tl.int64) * stride + token[:, None]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _store_tokens(base, token, channel, n, inside, tile):
    pointers = base + channel[None, :].to(tl.int64) * n + token[:, None]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _load_numbers(base, token, number, stride_s, stride_n, n, S: tl.constexpr):
    """(T, s) in float32 of B or C of a group, (s, n)."""
    pointers = base + number[None, :] * stride_s + token[:, None].to(tl.int64) * stride_n
    return tl.load(pointers, mask=(token < n)[:, None] & (number < S)[None, :], other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _steps(delta, bias, token, channel, stride, inside, rows, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """(steps, their derivative in delta), (T, channels); 0 where not inside."""
    raw = _load_tokens(delta, token, channel, stride, inside)
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if BIAS:
        raw += tl.load(bias + channel, mask=rows, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        small = tl.exp(-tl.abs(raw))
        one = 1.0 + small
        rounded = tl.where(one == 1.0, 1.0, one - 1.0)
        slope = tl.where(raw >= 0, 1.0, small) / one
        # log(1 + small) without the digits that 1 + small loses
        raw = tl.maximum(raw, 0.0) + tl.where(one == 1.0, small, tl.log(one) * (small / rounded))
    return tl.where(inside, raw, 0.0), slope


@triton.jit
@no_type_check
def ends(
    u,
    delta,
    bias,
    rates,
    numbers,
    gate,
    added,
    totals,
    stride_ub,
    stride_ud,
    stride_db,
    stride_dd,
    stride_zb,
    stride_zd,
    stride_nb,
    stride_ng,
    stride_ns,
    stride_nn,
    n,
    dim,
    width,
    groups,
    chunks,
    S: tl.constexpr,
    T: tl.constexpr,
    PAD_S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    BACK: tl.constexpr,
):
    """What a chunk adds to the state, from u and B, and the sum of its steps. BACK: to the gradient of the
    state before it, from the gradients of y (as u) and C."""
    blocks = (width + ROWS - 1) // ROWS
    group = tl.program_id(0) // blocks % groups
    chunk = tl.program_id(0) // (blocks * groups) % chunks
    b = (tl.program_id(0) // (blocks * groups * chunks)).to(tl.int64)
    place = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    rows, channel = place < width, group * width + place
    number = tl.arange(0, PAD_S)
    local = tl.arange(0, T)
    token = chunk * T + local
    inside = (token < n)[:, None] & rows[None, :]
    cells = rows[:, None] & (number < S)[None, :]
    A = tl.load(rates + channel[:, None] * S + number[None, :], mask=cells, other=0.0).to(tl.float32)
    delta += b * stride_db
    step, _ = _steps(delta, bias, token, channel, stride_dd, inside, rows, BIAS, SOFTPLUS)
    entered = _load_tokens(u + b * stride_ub, token, channel, stride_ud, inside)
    if BACK:
        if GATE:
            z = _load_tokens(gate + b * stride_zb, token, channel, stride_zd, inside)
            entered *= z * tl.sigmoid(z)
        along = tl.cumsum(step, 0)
    else:
        entered *= step
        later = inside & (local + 1 < T)[:, None] & (token + 1 < n)[:, None]
        ahead, _ = _steps(delta, bias, token + 1, channel, stride_dd, later, rows, BIAS, SOFTPLUS)
        along = tl.cumsum(ahead, 0, reverse=True)
    base = numbers + b * stride_nb + group * stride_ng
    weight = _load_numbers(base, token, number, stride_ns, stride_nn, n, S)
    left = tl.exp(along[:, :, None] * A[None, :, :])
    sums = tl.sum(left * (entered[:, :, None] * weight[:, None, :]), 0)
    at = (b * chunks + chunk) * dim + channel
    tl.store(added + at[:, None] * S + number[None, :], sums, mask=cells)
    tl.store(totals + at, tl.sum(step, 0), mask=rows)


@triton.jit
@no_type_check
def join(
    rates,
    added,
    totals,
    kept,
    dim,
    chunks,
    S: tl.constexpr,
    PAD_S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACK: tl.constexpr,
):
    """The states (chunks + 1, d, s) at all borders of chunks, from that at the first. BACK: from the last."""
    blocks = (dim + ROWS - 1) // ROWS
    b = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    number = tl.arange(0, PAD_S)
    rows = channel < dim
    cells = rows[:, None] & (number < S)[None, :]
    cell = channel[:, None] * S + number[None, :]
    A = tl.load(rates + cell, mask=cells, other=0.0).to(tl.float32)
    kept += b * (chunks + 1) * dim * S
    first = kept
    if BACK:
        first += tl.cast(chunks, tl.int64) * dim * S
    state = tl.load(first + cell, mask=cells, other=0.0)
    turn = tl.arange(0, COLUMNS)
    for begin in range(0, chunks, COLUMNS):
        there = begin + turn < chunks
        chunk = begin + turn
        border = chunk + 1
        if BACK:
            chunk = chunks - 1 - chunk
            border = chunk
        at = (b * chunks + chunk) * dim
        total = tl.load(
            totals + at[:, None] + channel[None, :], mask=there[:, None] & rows[None, :], other=0.0
        )
        live = there[:, None, None] & cells[None, :, :]
        new = tl.load(added + at[:, None, None] * S + cell[None, :, :], mask=live, other=0.0)
        decay = tl.exp(total[:, :, None] * A[None, :, :])
        faded, sums = tl.associative_scan((decay, new), 0, _after)
        after = sums + faded * state[None, :, :]
        to = border.to(tl.int64)[:, None, None] * dim * S + cell[None, :, :]
        tl.store(kept + to, after, mask=live)
        state = tl.sum(tl.where((turn == COLUMNS - 1)[:, None, None], after, 0.0), 0)


@triton.jit
@no_type_check
def outputs(
    u,
    delta,
    bias,
    rates,
    B,
    C,
    skip,
    gate,
    kept,
    out,
    stride_ub,
    stride_ud,
    stride_db,
    stride_dd,
    stride_zb,
    stride_zd,
    stride_bb,
    stride_bg,
    stride_bs,
    stride_bn,
    stride_cb,
    stride_cg,
    stride_cs,
    stride_cn,
    n,
    dim,
    width,
    groups,
    chunks,
    S: tl.constexpr,
    T: tl.constexpr,
    PAD_S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
):
    blocks = (width + ROWS - 1) // ROWS
    group = tl.program_id(0) // blocks % groups
    chunk = tl.program_id(0) // (blocks * groups) % chunks
    b = (tl.program_id(0) // (blocks * groups * chunks)).to(tl.int64)
    place = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    rows, channel = place < width, group * width + place
    number = tl.arange(0, PAD_S)
    local = tl.arange(0, T)
    token = chunk * T + local
    inside = (token < n)[:, None] & rows[None, :]
    cells = rows[:, None] & (number < S)[None, :]
    cell = channel[:, None] * S + number[None, :]
    A = tl.load(rates + cell, mask=cells, other=0.0).to(tl.float32)
    before = tl.load(kept + (b * (chunks + 1) + chunk) * dim * S + cell, mask=cells, other=0.0)
    x = _load_tokens(u + b * stride_ub, token, channel, stride_ud, inside)
    step, _ = _steps(delta + b * stride_db, bias, token, channel, stride_dd, inside, rows, BIAS, SOFTPLUS)
    into = _load_numbers(B + b * stride_bb + group * stride_bg, token, number, stride_bs, stride_bn, n, S)
    read = _load_numbers(C + b * stride_cb + group * stride_cg, token, number, stride_cs, stride_cn, n, S)
    decay = tl.exp(step[:, :, None] * A[None, :, :])
    entered = (step * x)[:, :, None] * into[:, None, :]
    entered += tl.where((local == 0)[:, None, None], decay * before[None, :, :], 0.0)
    _, h = tl.associative_scan((decay, entered), 0, _after)
    y = tl.sum(h * read[:, None, :], 2)
    if SKIP:
        y += x * tl.load(skip + channel, mask=rows, other=0.0).to(tl.float32)[None, :]
    if GATE:
        z = _load_tokens(gate + b * stride_zb, token, channel, stride_zd, inside)
        y *= z * tl.sigmoid(z)
    _store_tokens(out + b * dim * n, token, channel, n, inside, y)


@triton.jit
@no_type_check
def gradients(
    u,
    delta,
    bias,
    rates,
    B,
    C,
    skip,
    gate,
    grad,
    kept,
    dkept,
    du,
    ddelta,
    drates,
    dB,
    dC,
    dskip,
    dgate,
    stride_ub,
    stride_ud,
    stride_db,
    stride_dd,
    stride_zb,
    stride_zd,
    stride_yb,
    stride_yd,
    stride_bb,
    stride_bg,
    stride_bs,
    stride_bn,
    stride_cb,
    stride_cg,
    stride_cs,
    stride_cn,
    batch,
    n,
    dim,
    width,
    groups,
    chunks,
    splits,
    S: tl.constexpr,
    T: tl.constexpr,
    PAD_S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
):
    """All gradients of a chunk, for one of `splits` parts of a group's channels, block by block.

    dB and dC are summed over those channels, (splits, b, g, s, n); drates and dskip over the chunk,
    (b, chunks, d, s) and (b, chunks, d).
    """
    split = tl.program_id(0) % splits
    chunk = tl.program_id(0) // splits % chunks
    group = tl.program_id(0) // (splits * chunks) % groups
    row = tl.program_id(0) // (splits * chunks * groups)
    b = row.to(tl.int64)
    number = tl.arange(0, PAD_S)
    local = tl.arange(0, T)
    token = chunk * T + local
    into = _load_numbers(B + b * stride_bb + group * stride_bg, token, number, stride_bs, stride_bn, n, S)
    read = _load_numbers(C + b * stride_cb + group * stride_cg, token, number, stride_cs, stride_cn, n, S)
    dinto = tl.zeros([T, PAD_S], tl.float32)
    dread = tl.zeros([T, PAD_S], tl.float32)
    border = (b * (chunks + 1) + chunk) * dim * S
    delta += b * stride_db
    for begin in range(split * ROWS, width, splits * ROWS):
        place = begin + tl.arange(0, ROWS)
        rows, channel = place < width, group * width + place
        inside = (token < n)[:, None] & rows[None, :]
        cells = rows[:, None] & (number < S)[None, :]
        cell = channel[:, None] * S + number[None, :]
        A = tl.load(rates + cell, mask=cells, other=0.0).to(tl.float32)
        x = _load_tokens(u + b * stride_ub, token, channel, stride_ud, inside)
        step, slope = _steps(delta, bias, token, channel, stride_dd, inside, rows, BIAS, SOFTPLUS)
        # The states again.
        before = tl.load(kept + border + cell, mask=cells, other=0.0)
        decay = tl.exp(step[:, :, None] * A[None, :, :])
        entered = (step * x)[:, :, None] * into[:, None, :]
        come = tl.where((local == 0)[:, None, None], decay * before[None, :, :], 0.0)
        _, h = tl.associative_scan((decay, entered + come), 0, _after)

        dy = _load_tokens(grad + b * stride_yb, token, channel, stride_yd, inside)
        weight = x
        if SKIP:
            weight = tl.load(skip + channel, mask=rows, other=0.0).to(tl.float32)[None, :]
        if GATE:
            z = _load_tokens(gate + b * stride_zb, token, channel, stride_zd, inside)
            open_ = tl.sigmoid(z)
            y = tl.sum(h * read[:, None, :], 2)
            if SKIP:
                y += x * weight
            dz = dy * y * open_ * (1.0 + z * (1.0 - open_))
            _store_tokens(dgate + b * dim * n, token, channel, n, inside, dz)
            dy *= z * open_
        # The gradient of h_t is dy_t C_t and, through the decay of the next token, that of h_(t+1).
        later = inside & (local + 1 < T)[:, None] & (token + 1 < n)[:, None]
        ahead, _ = _steps(delta, bias, token + 1, channel, stride_dd, later, rows, BIAS, SOFTPLUS)
        after = tl.load(dkept + border + dim * S + cell, mask=cells, other=0.0)
        dh = dy[:, :, None] * read[:, None, :]
        dh += tl.where((local == T - 1)[:, None, None], after[None, :, :], 0.0)
        _, dh = tl.associative_scan((tl.exp(ahead[:, :, None] * A[None, :, :]), dh), 0, _after, reverse=True)

        # What is left of the state before; a fused product would leave rounding where nothing is left.
        dexponent = dh * tl.where(decay > 0.0, h - entered, 0.0)
        dentered = tl.sum(dh * into[:, None, :], 2)
        dstep = tl.sum(dexponent * A[None, :, :], 2) + dentered * x
        dx = dentered * step
        at = (b * chunks + chunk) * dim + channel
        if SKIP:
            dx += dy * weight
            tl.store(dskip + at, tl.sum(dy * x, 0), mask=rows)
        _store_tokens(du + b * dim * n, token, channel, n, inside, dx)
        _store_tokens(ddelta + b * dim * n, token, channel, n, inside, dstep * slope)
        drate = tl.sum(dexponent * step[:, :, None], 0)
        tl.store(drates + at[:, None] * S + number[None, :], drate, mask=cells)
        dinto += tl.sum(dh * (step * x)[:, :, None], 1)
        dread += tl.sum(h * dy[:, :, None], 1)
    plane = (split * batch + row).to(tl.int64) * groups + group
    to = plane * S * n + number[None, :].to(tl.int64) * n + token[:, None]
    live = (token < n)[:, None] & (number < S)[None, :]
    tl.store(dB + to, dinto, mask=live)
    tl.store(dC + to, dread, mask=live)
