"""The backward kernel of queries; it also leaves what the kernel of keys and values needs of each row."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from heedful.ops.backends.triton.tiles import LOG2E, dot, in_bands, load_tile, store_tile, unpack


@triton.jit
@no_type_check
def _walk(
    dq,
    dq_factor,
    q,
    q_factor,
    grad,
    level,
    center,
    key,
    value,
    key_factor,
    key_mask,
    stride_kn,
    stride_vn,
    stride_fn,
    entries,
    numbers,
    masks,
    begin,
    end,
    line,
    position,
    m,
    scale,
    low,
    high,
    end_key,
    low2,
    high2,
    end_key2,
    D: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_E: tl.constexpr,
    PAD_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    BANDS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    PARTS: tl.constexpr = (BLOCK_K + COLUMNS - 1) // COLUMNS
    local = tl.arange(0, COLUMNS)
    block = tl.load(entries + begin)
    number = block
    if MASKED and BANDS == 0:
        number = tl.load(numbers + begin)
    for step in range(begin * PARTS, end * PARTS):
        first = (step % PARTS) * COLUMNS
        start = block * BLOCK_K + first
        column = start + local
        inside = column < tl.minimum(block * BLOCK_K + BLOCK_K, m)
        k = load_tile(key, start, local, stride_kn, inside, D, PAD_D, EVEN)
        v = load_tile(value, start, local, stride_vn, inside, E, PAD_E, EVEN)
        logits = dot(q, tl.trans(k), None, PRECISION) * (scale * LOG2E)
        if R > 0:
            k_factor = load_tile(key_factor, start, local, stride_fn, inside, R, PAD_R, EVEN).to(tl.float32)
            logits += dot(q_factor, tl.trans(k_factor), None, "tf32x3")
        weight = tl.exp2(logits - level[:, None])
        if MASKED:
            if BANDS > 0:
                step_to = column[None, :] - position[:, None]
                seen = in_bands(step_to, column[None, :], low, high, end_key, low2, high2, end_key2, BANDS)
            else:
                seen = unpack(masks, number, line, first, LINES, WORDS, COLUMNS)
            weight = tl.where(seen, weight, 0.0)
        if KEY_MASK:
            shown = tl.load(key_mask + column, mask=inside, other=0) != 0
            weight = tl.where(shown[None, :], weight, 0.0)
        elif not EVEN:
            weight = tl.where(inside[None, :], weight, 0.0)
        dlogits = weight * (dot(grad, tl.trans(v), None, PRECISION) - center[:, None])
        dq = dot(dlogits.to(k.dtype), k, dq, PRECISION)
        if R > 0:
            dq_factor = dot(dlogits, k_factor, dq_factor, "tf32x3")
        at = (step + 1) // PARTS
        block = tl.load(entries + at)
        if MASKED and BANDS == 0:
            number = tl.load(numbers + at)
    return dq, dq_factor


@triton.jit
@no_type_check
def query_gradient(
    query,
    key,
    value,
    query_factor,
    key_factor,
    key_mask,
    out,
    lse,
    grad,
    grad_lse,
    dquery,
    dquery_factor,
    levels,
    centers,
    bounds,
    entries,
    numbers,
    masks,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_fqb,
    stride_fqh,
    stride_fqn,
    stride_fkb,
    stride_fkh,
    stride_fkn,
    stride_gb,
    stride_gh,
    stride_gn,
    plane_b,
    plane_h,
    entry_count,
    heads,
    repeats,
    n,
    m,
    query_blocks,
    offset,
    scale,
    low,
    high,
    end_key,
    low2,
    high2,
    end_key2,
    D: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_E: tl.constexpr,
    PAD_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    BANDS: tl.constexpr,
    PARTIAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    GRAD_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq_i = scale sum_j P_ij (g_i . v_j - center_i) k_j with center_i = g_i . out_i - d lse_i.

    levels: the lse in powers of 2, +inf for rows that see nothing, so that every P of theirs is 0.
    """
    PARTS: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    tiles = query_blocks * PARTS
    tile = tiles - 1 - tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    batch, head = plane // heads, plane % heads
    block, first = tile // PARTS, (tile % PARTS) * ROWS
    local = tl.arange(0, ROWS)
    start = block * BLOCK_Q + first
    row = start + local
    inside = row < tl.minimum(block * BLOCK_Q + BLOCK_Q, n)
    b, h, g = batch.to(tl.int64), head.to(tl.int64), (head // repeats).to(tl.int64)
    line = plane.to(tl.int64) * n

    q = load_tile(query + b * stride_qb + h * stride_qh, start, local, stride_qn, inside, D, PAD_D, False)
    grads = load_tile(grad + b * stride_gb + h * stride_gh, start, local, stride_gn, inside, E, PAD_E, False)
    outs = load_tile(out + line * E, start, local, E, inside, E, PAD_E, False)
    center = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    if GRAD_LSE:
        center -= tl.load(grad_lse + line + row, mask=inside, other=0.0).to(tl.float32)
    level = tl.load(lse + line + row, mask=inside, other=float("-inf")) * LOG2E
    level = tl.where(level == float("-inf"), float("inf"), level)
    tl.store(centers + line + row, center, mask=inside)
    tl.store(levels + line + row, level, mask=inside)

    q_factor = q
    if R > 0:
        base = query_factor + b * stride_fqb + h * stride_fqh
        q_factor = load_tile(base, start, local, stride_fqn, inside, R, PAD_R, False).to(tl.float32) * LOG2E
    dq = tl.zeros([ROWS, PAD_D], tl.float32)
    dq_factor = tl.zeros([ROWS, PAD_R], tl.float32)
    table = batch * plane_b + head * plane_h
    bounds += (table * query_blocks + block) * 3
    begin, middle, end = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    entries += table.to(tl.int64) * entry_count
    numbers += table.to(tl.int64) * entry_count
    key += b * stride_kb + g * stride_kh
    value += b * stride_vb + g * stride_vh
    key_factor += b * stride_fkb + h * stride_fkh
    key_mask += b * m
    for kind in tl.static_range(2):
        if kind == 0 or PARTIAL:
            dq, dq_factor = _walk(
                dq,
                dq_factor,
                q,
                q_factor,
                grads,
                level,
                center,
                key,
                value,
                key_factor,
                key_mask,
                stride_kn,
                stride_vn,
                stride_fkn,
                entries,
                numbers,
                masks,
                begin if kind == 0 else middle,
                middle if kind == 0 else end,
                first + local,
                row + offset,
                m,
                scale,
                low,
                high,
                end_key,
                low2,
                high2,
                end_key2,
                D,
                E,
                R,
                PAD_D,
                PAD_E,
                PAD_R,
                BLOCK_K,
                LINES,
                WORDS,
                COLUMNS,
                EVEN,
                BANDS,
                KEY_MASK,
                PRECISION,
                MASKED=kind == 1,
            )
    store_tile(dquery + line * D, start, local, D, inside, dq * scale, D, PAD_D)
    if R > 0:
        store_tile(dquery_factor + line * R, start, local, R, inside, dq_factor, R, PAD_R)
