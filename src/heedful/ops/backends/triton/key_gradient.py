"""The backward kernels of keys and values, which walk over the table turned around."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from heedful.ops.backends.triton.tiles import LOG2E, dot, in_bands, load_tile, store_tile, unpack


@triton.jit
@no_type_check
def _walk(
    dk,
    dv,
    dk_factor,
    k,
    v,
    k_factor,
    query,
    grad,
    query_factor,
    levels,
    centers,
    stride_qh,
    stride_qn,
    stride_gh,
    stride_gn,
    stride_fh,
    stride_fn,
    entries,
    numbers,
    masks,
    begin,
    end,
    line,
    column,
    n,
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
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    BANDS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    PARTS: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    local = tl.arange(0, ROWS)
    # The entry of a step is loaded one step ahead: nothing waits for it.
    entry = tl.load(entries + begin)
    number = entry
    if MASKED and BANDS == 0:
        number = tl.load(numbers + begin)
    for step in range(begin * PARTS, end * PARTS):
        head, block = (entry // query_blocks).to(tl.int64), entry % query_blocks
        first = (step % PARTS) * ROWS
        start = block * BLOCK_Q + first
        row = start + local
        inside = row < tl.minimum(block * BLOCK_Q + BLOCK_Q, n)
        q = load_tile(query + head * stride_qh, start, local, stride_qn, inside, D, PAD_D, EVEN)
        g = load_tile(grad + head * stride_gh, start, local, stride_gn, inside, E, PAD_E, EVEN)
        if EVEN:
            level = tl.load(levels + head * n + row)
            center = tl.load(centers + head * n + row)
        else:
            # Rows beyond the end are measured from +inf: their weights are 0.
            level = tl.load(levels + head * n + row, mask=inside, other=float("inf"))
            center = tl.load(centers + head * n + row, mask=inside, other=0.0)
        # Everything is transposed here: keys down, queries across.
        logits = dot(k, tl.trans(q), None, PRECISION) * (scale * LOG2E)
        if R > 0:
            base = query_factor + head * stride_fh
            q_factor = load_tile(base, start, local, stride_fn, inside, R, PAD_R, EVEN).to(tl.float32)
            logits += dot(k_factor, tl.trans(q_factor), None, "tf32x3")
        weight = tl.exp2(logits - level[None, :])
        if MASKED:
            if BANDS > 0:
                step_to = column[:, None] - (row + offset)[None, :]
                seen = in_bands(step_to, column[:, None], low, high, end_key, low2, high2, end_key2, BANDS)
            else:
                seen = unpack(masks, number, line, first, LINES, WORDS, ROWS)
            weight = tl.where(seen, weight, 0.0)
        dv = dot(weight.to(g.dtype), g, dv, PRECISION)
        dlogits = weight * (dot(v, tl.trans(g), None, PRECISION) - center[None, :])
        dk = dot(dlogits.to(q.dtype), q, dk, PRECISION)
        if R > 0:
            dk_factor = dot(dlogits, q_factor, dk_factor, "tf32x3")
        at = (step + 1) // PARTS
        entry = tl.load(entries + at)
        if MASKED and BANDS == 0:
            number = tl.load(numbers + at)
    return dk, dv, dk_factor


@triton.jit
@no_type_check
def key_gradient(
    query,
    key,
    value,
    query_factor,
    key_factor,
    key_mask,
    grad,
    levels,
    centers,
    dkey,
    dvalue,
    dkey_factor,
    spare_k,
    spare_v,
    spare_f,
    items,
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
    item_count,
    spare_count,
    kv_heads,
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
    PRECISION: tl.constexpr,
):
    """dv_j = sum_i P_ij g_i and dk_j = scale sum_i P_ij (g_i . v_j - center_i) q_i, over all query heads of
    the KV head. A program computes one item: some columns of a key block over a piece of its list."""
    PARTS: tl.constexpr = (BLOCK_K + COLUMNS - 1) // COLUMNS
    part = tl.program_id(0) % PARTS
    item = tl.program_id(0) // PARTS % item_count
    plane = tl.program_id(0) // (PARTS * item_count)
    batch, group = plane // kv_heads, plane % kv_heads
    table = (batch * plane_b + group * plane_h).to(tl.int64)
    items += (table * item_count + item) * 5
    block = tl.load(items)
    if block >= 0:
        begin, middle, end = tl.load(items + 1), tl.load(items + 2), tl.load(items + 3)
        spare = tl.load(items + 4)
        local = tl.arange(0, COLUMNS)
        first = part * COLUMNS
        start = block * BLOCK_K + first
        column = start + local
        inside = column < tl.minimum(block * BLOCK_K + BLOCK_K, m)
        b, g = batch.to(tl.int64), group.to(tl.int64)
        h = g * repeats

        k = load_tile(key + b * stride_kb + g * stride_kh, start, local, stride_kn, inside, D, PAD_D, False)
        v = load_tile(value + b * stride_vb + g * stride_vh, start, local, stride_vn, inside, E, PAD_E, False)
        k_factor = k
        if R > 0:
            base = key_factor + b * stride_fkb + g * stride_fkh
            k_factor = load_tile(base, start, local, stride_fkn, inside, R, PAD_R, False)
            k_factor = k_factor.to(tl.float32) * LOG2E
        dk = tl.zeros([COLUMNS, PAD_D], tl.float32)
        dv = tl.zeros([COLUMNS, PAD_E], tl.float32)
        dk_factor = tl.zeros([COLUMNS, PAD_R], tl.float32)
        entries += table * entry_count
        numbers += table * entry_count
        query += b * stride_qb + h * stride_qh
        grad += b * stride_gb + h * stride_gh
        query_factor += b * stride_fqb + h * stride_fqh
        rows = (b * kv_heads * repeats + h) * n
        for kind in tl.static_range(2):
            if kind == 0 or PARTIAL:
                dk, dv, dk_factor = _walk(
                    dk,
                    dv,
                    dk_factor,
                    k,
                    v,
                    k_factor,
                    query,
                    grad,
                    query_factor,
                    levels + rows,
                    centers + rows,
                    stride_qh,
                    stride_qn,
                    stride_gh,
                    stride_gn,
                    stride_fqh,
                    stride_fqn,
                    entries,
                    numbers,
                    masks,
                    begin if kind == 0 else middle,
                    middle if kind == 0 else end,
                    first + local,
                    column,
                    n,
                    query_blocks,
                    offset,
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
                    BLOCK_Q,
                    LINES,
                    WORDS,
                    ROWS,
                    EVEN,
                    BANDS,
                    PRECISION,
                    MASKED=kind == 1,
                )
        dk = dk * scale
        if KEY_MASK:
            # What hidden keys gathered concerns them alone, and is dropped.
            shown = (tl.load(key_mask + b * m + column, mask=inside, other=0) != 0)[:, None]
            dk, dv = tl.where(shown, dk, 0.0), tl.where(shown, dv, 0.0)
            dk_factor = tl.where(shown, dk_factor, 0.0)
        line = (b * kv_heads + g) * m
        if spare >= 0:
            place = ((b * kv_heads + g) * spare_count + spare) * BLOCK_K
            store_tile(spare_k + place * D, first, local, D, inside, dk, D, PAD_D)
            store_tile(spare_v + place * E, first, local, E, inside, dv, E, PAD_E)
            if R > 0:
                store_tile(spare_f + place * R, first, local, R, inside, dk_factor, R, PAD_R)
        else:
            store_tile(dkey + line * D, start, local, D, inside, dk, D, PAD_D)
            store_tile(dvalue + line * E, start, local, E, inside, dv, E, PAD_E)
            if R > 0:
                store_tile(dkey_factor + line * R, start, local, R, inside, dk_factor, R, PAD_R)


@triton.jit
@no_type_check
def add_spares(
    spares,
    total,
    ranges,
    plane_b,
    plane_h,
    spare_count,
    kv_heads,
    m,
    key_blocks,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of the pieces of key blocks that were cut, always in the same order."""
    PARTS: tl.constexpr = (BLOCK_K + COLUMNS - 1) // COLUMNS
    first = tl.program_id(0) % PARTS * COLUMNS
    block = tl.program_id(0) // PARTS % key_blocks
    plane = (tl.program_id(0) // (PARTS * key_blocks)).to(tl.int64)
    table = plane // kv_heads * plane_b + plane % kv_heads * plane_h
    ranges += (table * key_blocks + block) * 2
    begin, count = tl.load(ranges), tl.load(ranges + 1)
    if count > 0:
        local = tl.arange(0, COLUMNS)
        start = block * BLOCK_K + first
        inside = start + local < tl.minimum(block * BLOCK_K + BLOCK_K, m)
        result = tl.zeros([COLUMNS, PAD], tl.float32)
        for spare in range(begin, begin + count):
            place = (plane * spare_count + spare) * BLOCK_K * WIDTH
            result += load_tile(spares + place, first, local, WIDTH, inside, WIDTH, PAD, False)
        store_tile(total + plane * m * WIDTH, start, local, WIDTH, inside, result, WIDTH, PAD)
