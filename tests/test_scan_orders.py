from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from heedful.ops.scan import selective_scan
from heedful.ops.scan_orders import (
    ROUTES,
    both_ways,
    diagonal,
    inverse_order,
    raster,
    scan_routes,
    snake,
    spiral,
    strided,
    tiles,
    token_numbers,
)

SIZES = [(1, 1), (1, 6), (5, 1), (2, 2), (4, 5), (5, 4), (6, 6), (7, 3)]


def numbers(cells: list[tuple[int, ...]], size: tuple[int, ...]) -> list[int]:
    return [sum(c * s for c, s in zip(cell, strides(size), strict=True)) for cell in cells]


def strides(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(torch.tensor(size[axis + 1 :]).prod()) for axis in range(len(size)))


@pytest.mark.parametrize("size", SIZES)
def test_rows_and_columns(size):
    h, w = size
    tokens = token_numbers(size)
    rows = [(i, j) for i in range(h) for j in range(w)]
    columns = [(i, j) for j in range(w) for i in range(h)]
    assert raster(tokens).tolist() == numbers(rows, size)
    assert raster(tokens.mT).tolist() == numbers(columns, size)


@pytest.mark.parametrize("size", [*SIZES, (2, 3, 4), (3, 3, 3)])
def test_a_snake_moves_by_one_cell(size):
    cells = torch.stack(torch.unravel_index(snake(token_numbers(size)), size))
    assert (cells.diff(dim=1).abs().sum(0) == 1).all()
    assert cells[:, 0].tolist() == [0] * len(size)
    first_row = cells[-1, : size[-1]]
    assert first_row.tolist() == list(range(size[-1]))


@pytest.mark.parametrize("size", SIZES)
def test_diagonals(size):
    h, w = size
    cells = []
    for k in range(h + w - 1):
        line = [(i, k - i) for i in range(h) if 0 <= k - i < w]
        cells += line if k % 2 else line[::-1]
    assert diagonal(token_numbers(size)).tolist() == numbers(cells, size)


@pytest.mark.parametrize("size", SIZES)
def test_spiral(size):
    h, w = size
    cells, (i, j), (down, right) = [(0, 0)], (0, 0), (0, 1)
    while len(cells) < h * w:
        ahead = (i + down, j + right)
        if 0 <= ahead[0] < h and 0 <= ahead[1] < w and ahead not in cells:
            i, j = ahead
            cells.append(ahead)
        else:
            down, right = right, -down  # a turn to the right
    assert spiral(token_numbers(size)).tolist() == numbers(cells, size)


@pytest.mark.parametrize(("size", "tile"), [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((3, 4, 5), (2, 2, 4))])
def test_tiles(size, tile):
    cells = sorted(
        itertools.product(*map(range, size)),
        key=lambda cell: (*(c // t for c, t in zip(cell, tile, strict=True)), *cell),
    )
    assert tiles(token_numbers(size), tile).tolist() == numbers(cells, size)


@pytest.mark.parametrize(("size", "step"), [((4, 6), 2), ((5, 7), 3), ((2, 2), 3), ((3, 4, 5), 2)])
def test_strided(size, step):
    cells = sorted(itertools.product(*map(range, size)), key=lambda cell: (*(c % step for c in cell), *cell))
    assert strided(token_numbers(size), step).tolist() == numbers(cells, size)


@given(name=st.sampled_from(ROUTES), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_routes_are_permutations_with_their_inverses(name, size):
    n = size[0] * size[1]
    routes = scan_routes(name, size)
    assert routes.shape == (4, n)
    assert_close(routes.sort(dim=1).values, torch.arange(n).expand(4, n))
    assert_close(routes.gather(1, inverse_order(routes)), torch.arange(n).expand(4, n))
    assert torch.equal(routes[1::2], routes[::2].flip(1))


@pytest.mark.parametrize(
    ("name", "first", "counterpart"),
    [
        ("raster", [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]),
        ("snake", [0, 1, 2, 5, 4, 3], [0, 3, 4, 1, 2, 5]),
        ("diagonal", [0, 1, 3, 4, 2, 5], [2, 1, 5, 4, 0, 3]),
        ("spiral", [0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0]),
    ],
)
def test_routes_over_two_rows_of_three(name, first, counterpart):
    assert scan_routes(name, (2, 3))[::2].tolist() == [first, counterpart]


def test_what_a_caller_writes_into_routes_stays_his():
    scan_routes("spiral", (3, 4)).zero_()
    assert scan_routes("spiral", (3, 4)).sum() == 4 * 66


def test_a_scan_of_the_reversed_route_is_the_reversed_scan():
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(1, 2, 12, generator=generator, dtype=torch.float64) for _ in range(4))
    A = -torch.rand(2, 2, generator=generator, dtype=torch.float64)
    forward, backward = both_ways(snake(token_numbers((3, 4))))

    def along(order):
        y = selective_scan(*(x[..., order] for x in (u, delta.abs())), A, B[..., order], C[..., order])
        return y[..., inverse_order(order)]

    flipped = selective_scan(
        *(x[..., forward].flip(-1) for x in (u, delta.abs())),
        A,
        B[..., forward].flip(-1),
        C[..., forward].flip(-1),
    )
    assert_close(along(backward), flipped.flip(-1)[..., inverse_order(forward)])
    assert not torch.allclose(along(backward), along(forward))


@pytest.mark.door
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_numbers((3, 0)), r"size\[1\] is 0, must be a whole number of at least 1"),
        (
            lambda: diagonal(token_numbers((2, 2, 2))),
            r"tokens has shape \(2, 2, 2\), must be \(height, width\)",
        ),
        (lambda: spiral(token_numbers((4,))), r"tokens has shape \(4,\), must be \(height, width\)"),
        (lambda: tiles(token_numbers((4, 4)), (2,)), r"size is \(2,\), must have one length for each of 2"),
        (lambda: tiles(token_numbers((4, 4)), (2, 0)), r"size\[1\] is 0, must be a whole number"),
        (lambda: strided(token_numbers((4, 4)), 0), r"step is 0, must be a whole number of at least 1"),
        (lambda: scan_routes("zigzag", (4, 4)), r"name is 'zigzag', must be one of 'raster', 'snake'"),
        (lambda: scan_routes("snake", (2, 4, 4)), r"size is \(2, 4, 4\), must be \(height, width\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
