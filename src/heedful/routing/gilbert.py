"""The generalised Hilbert curve: an order of the tokens of a video in which blocks are compact in space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.kept import kept

_Vector = tuple[int, int, int]


def gilbert_order(size: Sequence[int]) -> Int[Tensor, " n"]:
    """Row-major token numbers of a video in the order of a generalised Hilbert curve.

    size: (frames, height, width), any lengths; the curve is laid out with the axes width, height, frames.
    Successive tokens are neighbours (but for a few diagonal steps at odd lengths), so that a run of them is
    a compact piece of the video. Raises ValueError unless size is three positive lengths.
    Source: the space-filling curve of Jenga and Rectified SpaAttn, arXiv 2511.19835.
    """
    _check_size(size)
    return _order(tuple(size)).clone()


def block_neighbors(size: Sequence[int], block_size: int) -> Bool[Tensor, "g g"]:
    """Which blocks of the curve touch: one holds a token next to a token of the other (3 x 3 x 3), or it.

    size: (frames, height, width); a block is block_size successive tokens of `gilbert_order(size)`, the last
    one may be shorter. Raises ValueError on sizes that are not positive.
    Source: Rectified SpaAttn, arXiv 2511.19835.
    """
    _check_size(size)
    check_positive("block_size", block_size)
    return _neighbors(tuple(size), block_size).clone()


def _check_size(size: Sequence[int]) -> None:
    if len(size) != 3:
        raise ValueError(f"size is {tuple(size)}, must be (frames, height, width)")
    for axis, length in enumerate(size):
        check_positive(f"size[{axis}]", length)


@kept(16)
def _order(size: tuple[int, ...]) -> Int[Tensor, " n"]:
    _, height, width = size
    lengths = (width, height, size[0])
    # The curve begins along the longest axis, the earlier one of equals; the others keep their order.
    first = lengths.index(max(lengths))
    axes = [first, *(axis for axis in range(3) if axis != first)]
    a, b, c = (_step(axis, lengths[axis]) for axis in axes)
    return torch.tensor([(z * height + y) * width + x for x, y, z in _curve((0, 0, 0), a, b, c)])


@kept(16)
def _neighbors(size: tuple[int, ...], block_size: int) -> Bool[Tensor, "g g"]:
    tokens = math.prod(size)
    block = torch.empty(tokens, dtype=torch.int64)
    block[_order(size)] = torch.arange(tokens) // block_size
    block = block.view(*size)
    count = -(-tokens // block_size)
    touch = torch.zeros(count, count, dtype=torch.bool)
    for step in itertools.product((-1, 0, 1), repeat=3):
        here = [slice(max(0, -s), length - max(0, s)) for s, length in zip(step, size, strict=True)]
        there = [slice(max(0, s), length - max(0, -s)) for s, length in zip(step, size, strict=True)]
        touch[block[tuple(here)].flatten(), block[tuple(there)].flatten()] = True
    return touch


def _curve(at: _Vector, a: _Vector, b: _Vector, c: _Vector) -> Iterator[_Vector]:
    """The cells of the box that a, b and c span at `at`, from its corner `at` to its far end along a."""
    long, wide, deep = _length(a), _length(b), _length(c)
    for side, others in ((a, wide * deep), (b, long * deep), (c, long * wide)):
        if others == 1:
            for i in range(_length(side)):
                yield _add(at, _unit(side), i)
            return
    half_a, half_b, half_c = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = (_add(x, y, -1) for x, y in ((a, half_a), (b, half_b), (c, half_c)))
    end_a = _add(_add(at, a), _unit(a), -1)  # the last cells along a and along c
    end_c = _add(_add(at, c), _unit(c), -1)
    turn_b = _add(half_b, _unit(b), -1)  # from the first to the last cell of the first half of b
    if 2 * long > 3 * wide and 2 * long > 3 * deep:  # a long box: two of half the length
        yield from _curve(at, half_a, b, c)
        yield from _curve(_add(at, half_a), rest_a, b, c)
    elif 3 * wide > 4 * deep:  # a flat one: up half of b, along a, and down again
        yield from _curve(at, half_b, c, half_a)
        yield from _curve(_add(at, half_b), a, rest_b, c)
        yield from _curve(_add(end_a, turn_b), _back(half_b), c, _back(rest_a))
    elif 3 * deep > 4 * wide:  # the same with c
        turn_c = _add(half_c, _unit(c), -1)
        yield from _curve(at, half_c, half_a, b)
        yield from _curve(_add(at, half_c), a, b, rest_c)
        yield from _curve(_add(end_a, turn_c), _back(half_c), _back(rest_a), b)
    else:  # about a cube: five pieces
        far = _add(end_a, end_c, 1)
        far = _add(far, at, -1)  # the last cell along both a and c
        yield from _curve(at, half_b, half_c, half_a)
        yield from _curve(_add(at, half_b), c, half_a, rest_b)
        yield from _curve(_add(end_c, turn_b), a, _back(half_b), _back(rest_c))
        yield from _curve(_add(far, half_b), _back(c), _back(rest_a), rest_b)
        yield from _curve(_add(end_a, turn_b), _back(half_b), half_c, _back(rest_a))


def _step(axis: int, length: int) -> _Vector:
    return (length * (axis == 0), length * (axis == 1), length * (axis == 2))


def _add(x: _Vector, y: _Vector, times: int = 1) -> _Vector:
    return (x[0] + times * y[0], x[1] + times * y[1], x[2] + times * y[2])


def _back(x: _Vector) -> _Vector:
    return (-x[0], -x[1], -x[2])


def _length(x: _Vector) -> int:
    return abs(sum(x))


def _unit(x: _Vector) -> _Vector:
    return (_sign(x[0]), _sign(x[1]), _sign(x[2]))


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)


def _half(x: _Vector) -> _Vector:
    """About half of a side; an even number of cells where the side has more than two."""
    half = (x[0] // 2, x[1] // 2, x[2] // 2)
    return _add(half, _unit(x)) if _length(half) % 2 and _length(x) > 2 else half
