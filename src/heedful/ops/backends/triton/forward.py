"""The forward kernel: one program computes some rows of a query block, key block by key block."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from heedful.ops.backends.triton.tiles import LOG2E, dot, in_bands, load_tile, store_tile, unpack


@triton.jit
@no_type_check
def _walk(
    acc,
    total,
    top,
    q,
    q_factor,
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
    # The block number of a step is loaded one step ahead: nothing waits for it.
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
        logits = dot(q, tl.trans(k), None, PRECISION)
        factor = scale * LOG2E
        if R > 0:
            k_factor = load_tile(key_factor, start, local, stride_fn, inside, R, PAD_R, EVEN).to(tl.float32)
            logits = logits * factor + dot(q_factor, tl.trans(k_factor), None, "tf32x3")
            factor = 1.0
        if MASKED:
            if BANDS > 0:
                step_to = column[None, :] - position[:, None]
                seen = in_bands(step_to, column[None, :], low, high, end_key, low2, high2, end_key2, BANDS)
            else:
                seen = unpack(masks, number, line, first, LINES, WORDS, COLUMNS)
            logits = tl.where(seen, logits, float("-inf"))
        if KEY_MASK:
            shown = tl.load(key_mask + column, mask=inside, other=0) != 0
            logits = tl.where(shown[None, :], logits, float("-inf"))
        elif not EVEN:
            logits = tl.where(inside[None, :], logits, float("-inf"))

        higher = tl.maximum(top, tl.max(logits, 1) * factor)
        level = higher
        if MASKED or KEY_MASK:
            # A row that has seen nothing yet is measured from 0: -inf - -inf would be NaN.
            level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(logits * factor - level[:, None])
        fade = tl.exp2(top - level)
        v = load_tile(value, start, local, stride_vn, inside, E, PAD_E, EVEN)
        total = total * fade + tl.sum(weight, 1)
        acc = dot(weight.to(v.dtype), v, acc * fade[:, None], PRECISION)
        top = higher
        at = (step + 1) // PARTS
        block = tl.load(entries + at)
        if MASKED and BANDS == 0:
            number = tl.load(numbers + at)
    return acc, total, top


@triton.jit
@no_type_check
def attend(
    query,
    key,
    value,
    query_factor,
    key_factor,
    sink,
    key_mask,
    out,
    lse,
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
    SINK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax(scale q k^T + bias over visible keys and the sink) v, and its log-sum-exp."""
    PARTS: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    tiles = query_blocks * PARTS
    # Late rows first: under a causal mask they are the longest.
    tile = tiles - 1 - tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    batch, head = plane // heads, plane % heads
    block, first = tile // PARTS, (tile % PARTS) * ROWS
    local = tl.arange(0, ROWS)
    start = block * BLOCK_Q + first
    row = start + local
    inside = row < tl.minimum(block * BLOCK_Q + BLOCK_Q, n)
    b, h, g = batch.to(tl.int64), head.to(tl.int64), (head // repeats).to(tl.int64)

    q = load_tile(query + b * stride_qb + h * stride_qh, start, local, stride_qn, inside, D, PAD_D, False)
    q_factor = q
    if R > 0:
        base = query_factor + b * stride_fqb + h * stride_fqh
        q_factor = load_tile(base, start, local, stride_fqn, inside, R, PAD_R, False).to(tl.float32) * LOG2E
    acc = tl.zeros([ROWS, PAD_E], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)

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
            acc, total, top = _walk(
                acc,
                total,
                top,
                q,
                q_factor,
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
    if SINK:
        extra = tl.load(sink + head).to(tl.float32) * LOG2E
        higher = tl.maximum(top, extra)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(top - level)
        acc = acc * fade[:, None]
        total = total * fade + tl.exp2(extra - level)
        top = higher
    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    level = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) / LOG2E)
    line = plane.to(tl.int64) * n
    store_tile(out + line * E, start, local, E, inside, acc, E, PAD_E)
    tl.store(lse + line + row, level, mask=inside)
