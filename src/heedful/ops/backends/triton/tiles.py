"""What the kernels share: loading tiles, and which pairs of a tile are visible."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # kernels compute powers of 2
# Triton's interpreter multiplies bfloat16 matrices as if they were integers; there they are widened first.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
@no_type_check
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b (+ acc), in float32."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
@no_type_check
def load_tile(
    base, start, local, stride, inside, WIDTH: tl.constexpr, PAD: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows start + local of a matrix, zeros beyond its width and where not inside. WHOLE: all are inside."""
    across = tl.arange(0, PAD)
    pointers = base + start.to(tl.int64) * stride + local[:, None] * stride + across[None, :]
    if WHOLE:
        if WIDTH == PAD:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(across < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers, mask=inside[:, None] & (across < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
@no_type_check
def store_tile(base, start, local, stride, inside, tile, WIDTH: tl.constexpr, PAD: tl.constexpr):
    across = tl.arange(0, PAD)
    pointers = base + start.to(tl.int64) * stride + local[:, None] * stride + across[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside[:, None] & (across < WIDTH)[None, :])


@triton.jit
@no_type_check
def in_bands(step, key, low, high, end, low2, high2, end2, BANDS: tl.constexpr):
    """Whether pairs with step = key - query position, and the keys, are in one of the bands."""
    seen = (step >= low) & (step <= high) & (key < end)
    if BANDS > 1:
        seen = seen | ((step >= low2) & (step <= high2) & (key < end2))
    return seen


@triton.jit
@no_type_check
def unpack(masks, number, line, first, LINES: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr):
    """Bits first to first + SPAN of some lines of a packed mask, (lines, SPAN)."""
    base = masks + number.to(tl.int64) * (LINES * WORDS) + (first // 32) * LINES + line
    bit = tl.arange(0, SPAN)
    word = tl.load(base)[:, None]
    if SPAN < 32:
        bit += first % 32
    # Which word a column needs is known when the kernel is compiled: the choice costs nothing.
    for w in tl.static_range(1, SPAN // 32):
        word = tl.where((bit // 32 == w)[None, :], tl.load(base + w * LINES)[:, None], word)
    return ((word >> (bit % 32)[None, :]) & 1) != 0
