"""Patterns of video and diffusion models against literal transcriptions of their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heedful
from heedful.patterns.inward_window import InwardWindow
from heedful.patterns.neighborhood import Neighborhood
from heedful.patterns.pattern import Pattern
from heedful.patterns.quadrant_window import QuadrantWindow
from heedful.patterns.radial import Radial
from heedful.patterns.split_windows import SplitWindows

CPU = torch.device("cpu")


# -- the definitions, step by step ---------------------------------------------------------------------


def radial(pattern: Radial) -> Tensor:
    """The card's steps with whole frame-by-frame matrices; then blocks to tokens."""
    frames, tokens, size = pattern.shape[0], math.prod(pattern.shape[1:]), pattern.block_size
    video = frames * tokens
    count = math.ceil((video + pattern.text) / size)
    seen = [[i >= video // size or j >= video // size for j in range(count)] for i in range(count)]

    def bits(x: int) -> int:
        return len(f"{x:b}") if x else 0

    for i, j in itertools.product(range(frames), repeat=2):
        distance = abs(i - j)
        length = 2 ** bits(tokens) / 2 ** bits(distance)
        width = tokens if distance <= 1 else max(length * pattern.decay, size)
        if pattern.sink_frame and j == 0:
            width = tokens
        elif length < 128 and distance % int(128 / length):
            continue
        top, left = i * tokens % size, j * tokens % size
        most = math.ceil(tokens / size) * size
        local = torch.zeros(top + most, left + most)
        for r in range(tokens):
            for c in range(tokens):
                local[top + r, left + c] = abs(r - c) <= width
        for a in range((top + most) // size):
            for b in range((left + most) // size):
                block = local[a * size : (a + 1) * size, b * size : (b + 1) * size]
                density = block.sum(0) / size
                kept = (density > 1 / 3).sum() / ((density > 0).sum() + 1e-9) > 0.6
                row, column = i * tokens // size + a, j * tokens // size + b
                if kept and row < count and column < count:
                    seen[row][column] = True
    n = video + pattern.text
    return torch.tensor([[seen[q // size][k // size] for k in range(n)] for q in range(n)])


def inward(pattern: InwardWindow) -> Tensor:
    frames, height, width = pattern.shape
    places = list(itertools.product(range(frames), range(height), range(width)))

    def near(q: int, k: int, d: int, length: int) -> bool:
        below, beyond = max(d - q, 0), max(d + q - length + 1, 0)
        return q - d - beyond <= k <= q + d + below

    return torch.tensor(
        [
            [
                near(q[1], k[1], pattern.half[0], height) and near(q[2], k[2], pattern.half[1], width)
                for k in places
            ]
            for q in places
        ]
    )


def quadrant(pattern: QuadrantWindow) -> Tensor:
    """Number the tokens, roll, cut into four windows, and look which numbers meet."""
    height, width = pattern.shape
    wh, ww = height // 2, width // 2
    down, right = wh // 4 * pattern.shift, ww // 4 * pattern.shift
    numbers = torch.arange(height * width).view(height, width)
    if down > 0:
        numbers = torch.roll(numbers, (-down, -right), (0, 1))
    windows = numbers.view(2, wh, 2, ww).permute(0, 2, 1, 3).reshape(4, -1).tolist()
    seen = torch.zeros(height * width, height * width, dtype=torch.bool)
    for window in windows:
        for q, k in itertools.product(window, window):
            seen[q, k] = True
    return seen


def split(pattern: SplitWindows) -> Tensor:
    cuts = [
        [part.tolist() for part in torch.arange(length).tensor_split(count)]
        for length, count in zip(pattern.shape, pattern.windows, strict=True)
    ]
    places = list(itertools.product(*map(range, pattern.shape)))
    return torch.tensor(
        [
            [
                all(
                    any(a in part and b in part for part in cut) for a, b, cut in zip(q, k, cuts, strict=True)
                )
                for k in places
            ]
            for q in places
        ]
    )


LITERAL = {Radial: radial, InwardWindow: inward, QuadrantWindow: quadrant, SplitWindows: split}

PATTERNS = [
    Radial((4, 2, 8), 0.7, 4),
    Radial((6, 5, 3), 0.3, 4, sink_frame=True),  # frames are no multiple of the blocks
    Radial((5, 7), 1.0, 3, text=4),
    Radial((1, 5, 5), 0.2, 8),
    Radial((3, 64), 0.2, 16, sink_frame=True, text=9),
    Radial((6, 40), 0.1, 6),
    Radial((4, 70), 0.1, 32, text=30),  # thinned out: of distances 1, 2, 3 none is a multiple of 2, 4, 4
    InwardWindow((2, 5, 6), (1, 2)),
    InwardWindow((1, 4, 3), (3, 0)),
    InwardWindow((3, 5, 4), 2),
    *(QuadrantWindow((8, 12), shift) for shift in range(4)),
    QuadrantWindow((18, 10), 3),
    QuadrantWindow((6, 8), 2),  # floor(3 / 4) = 0: no shift at all
    QuadrantWindow((8, 6), 2),  # a shift along the height alone
    QuadrantWindow((2, 2), 1),
    SplitWindows((2, 7, 5), (1, 3, 2)),
    SplitWindows((3, 4), (5, 3)),  # more windows than tokens
    SplitWindows((2, 4, 4), (1, 1, 1)),
    SplitWindows((11,), (4,)),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_mask_is_the_definition(pattern: Pattern) -> None:
    expected = LITERAL[type(pattern)](pattern)
    assert torch.equal(pattern.mask(len(expected))[0, 0], expected)


@st.composite
def radials(draw) -> Radial:
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 20)))
    return Radial(
        shape,
        draw(st.sampled_from([0.2, 0.95, 1.5])),
        draw(st.integers(1, 9)),
        draw(st.booleans()),
        draw(st.integers(0, 5)),
    )


@given(radials())
@settings(max_examples=20)
def test_radial_mask_is_the_definition(pattern: Radial) -> None:
    expected = radial(pattern)
    assert torch.equal(pattern.mask(len(expected))[0, 0], expected)


# -- tables, groups, attention -------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("bq", "bk", "fewer"), [(1, 1, 0), (3, 5, 0), (8, 4, 7), (64, 128, 0)])
def test_tiles_and_block_table(pattern: Pattern, bq: int, bk: int, fewer: int) -> None:
    m = math.prod(pattern.shape) + getattr(pattern, "text", 0)
    n = max(1, m - fewer)
    expected = pattern.mask(n, m)
    table = pattern.block_table(n, m, block_size=(bq, bk))
    assert torch.equal(table.dense(), expected)
    padded = torch.zeros(-(-n // bq) * bq, -(-m // bk) * bk, dtype=torch.bool)
    padded[:n, :m] = expected
    whole = torch.ones_like(padded)
    whole[:n, :m] = expected
    some, every = (x.unflatten(1, (-1, bk)).unflatten(0, (-1, bq)).transpose(1, 2) for x in (padded, whole))
    some, every = some.flatten(2).any(-1), every.flatten(2).all(-1)
    live = torch.arange(table.index.shape[-1]) < table.count[..., None]
    assert torch.equal(table.count[0, 0], some.sum(-1))
    assert int((table.kind * live).sum()) == int((every & some).sum())


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if not isinstance(p, Radial)], ids=str)
def test_groups_hold_each_pair_once(pattern: Pattern) -> None:
    n = math.prod(pattern.shape)
    groups = pattern.groups(n, n, 0, CPU)
    assert groups is not None
    assert torch.equal(groups.dense(), pattern.mask(n))
    assert int(groups.pair_mask().sum()) == int(pattern.mask(n).sum())
    if not isinstance(pattern, InwardWindow):
        assert groups.mask_fn is None  # the groups are the windows


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_attention_with_gradients(pattern: Pattern, backend: str) -> None:
    torch.manual_seed(0)
    n = math.prod(pattern.shape) + getattr(pattern, "text", 0)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seen = LITERAL[type(pattern)](pattern)
    logits = (q @ k.mT / 2).masked_fill(~seen, -torch.inf)
    blind = ~seen.any(-1)[:, None]
    expected = logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v
    y = heedful.attention(q, k, v, pattern=pattern, backend=backend)
    torch.testing.assert_close(y, expected)
    up = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (q, k, v), up), torch.autograd.grad(expected, (q, k, v), up)
    )


@pytest.mark.door  # run-time shape checks cannot be traced
@pytest.mark.parametrize(
    "pattern", PATTERNS[1:2] + PATTERNS[7:8] + PATTERNS[11:12] + PATTERNS[-4:-3], ids=str
)
def test_mask_mod_is_traced_whole(pattern: Pattern) -> None:
    n = math.prod(pattern.shape)
    q, k = torch.arange(n)[:, None], torch.arange(n)
    zero = torch.tensor(0)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    found = torch.compile(pattern.mask_mod(), backend=keep, fullgraph=True)(zero, zero, q, k)
    assert torch.equal(found, pattern.mask(n)[0, 0])
    calls = {str(node.target) for node in graphs[0].graph.nodes if node.op != "output"}
    assert not any("arange" in call or "cumsum" in call for call in calls)


# -- what the papers say -------------------------------------------------------------------------------


def test_radial_one_frame_is_full() -> None:
    assert Radial((1, 8, 8), 0.2, 16).mask(64).all()


def test_radial_neighbouring_frames_see_each_other_whole() -> None:
    mask = Radial((5, 256), 0.2, 64).mask(5 * 256)[0, 0].view(5, 256, 5, 256)
    for i, j in itertools.product(range(5), repeat=2):
        assert bool(mask[i, :, j].all()) == (abs(i - j) <= 1)
        assert mask[i, :, j].any()


def test_radial_windows_halve_as_the_distance_doubles() -> None:
    size, tokens = 16, 2048
    first = torch.arange(0, 17 * tokens, size)
    zero = torch.tensor(0)
    seen = Radial((17, tokens), 1.0, size).visible(zero, zero, first[:, None], first)
    seen = seen.view(17, tokens // size, 17, tokens // size)
    widths = [int(seen[0, tokens // size // 2, j].sum()) for j in (2, 4, 8, 16)]
    for wide, narrow in itertools.pairwise(widths):
        assert abs(narrow - wide / 2) <= 2


def test_radial_is_symmetric_where_blocks_divide_frames() -> None:
    mask = Radial((4, 192), 0.4, 32).mask(768)[0, 0]
    assert torch.equal(mask, mask.T)


@pytest.mark.parametrize("frames", [1, 4, 9])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_radial_leaves_no_token_blind_where_a_frame_holds_a_block(frames: int, size: int) -> None:
    for tokens in range(size, 3 * size, 7):
        pattern = Radial((frames, tokens), 0.2, size)
        zero, first = torch.tensor(0), torch.arange(0, frames * tokens, size)
        assert pattern.visible(zero, zero, first[:, None], first).any(-1).all()


def test_radial_needs_no_buffer_of_frames() -> None:
    pattern = Radial((33, 48, 80), 0.95, 128, sink_frame=True)
    table = pattern.block_table(33 * 48 * 80)
    assert 0.2 < table.visited() < 0.35
    assert bool((table.kind[..., 0] == 1).all())  # no tile is partial


def test_inward_windows_never_shrink() -> None:
    pattern = InwardWindow((3, 9, 11), (2, 3))
    assert (pattern.mask(297).sum(-1) == 3 * 5 * 7).all()
    corner = pattern.mask(297)[0, 0, 0].view(3, 9, 11)
    assert corner[:, :5, :7].all()
    assert int(corner.sum()) == 3 * 5 * 7
    assert torch.equal(pattern.mask(297), Neighborhood((3, 9, 11), (3, 5, 7)).mask(297))


def test_inward_window_as_large_as_the_frame_is_full() -> None:
    assert InwardWindow((2, 4, 5), (2, 2)).mask(40).all()
    assert not InwardWindow((2, 6, 5), (2, 2)).mask(60).all()


def test_quadrant_windows_see_a_quarter_each() -> None:
    for shift in range(4):
        assert (QuadrantWindow((10, 16), shift).mask(160).sum(-1) == 40).all()
    corners = QuadrantWindow((16, 16), 1).mask(256)[0, 0].view(16, 16, 16, 16)
    assert corners[0, 0, 15, 15]  # across both borders
    assert not QuadrantWindow((16, 16), 0).mask(256)[0, 0].view(16, 16, 16, 16)[0, 0, 15, 15]


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape is \(4,\), must be"):
        Radial((4,))
    with pytest.raises(ValueError, match="decay is 0"):
        Radial((4, 4), 0)
    with pytest.raises(ValueError, match="block_size is 0"):
        Radial((4, 4), block_size=0)
    with pytest.raises(ValueError, match="text is -1"):
        Radial((4, 4), text=-1)
    with pytest.raises(ValueError, match=r"is for 18 keys .* was given 16 keys"):
        Radial((4, 4), text=2).mask(16)
    with pytest.raises(ValueError, match="half is -1"):
        InwardWindow((2, 3, 3), (-1, 1))
    with pytest.raises(ValueError, match=r"half is \(1,\)"):
        InwardWindow((2, 3, 3), (1,))
    with pytest.raises(ValueError, match=r"shape is \(4, 5\), must be \(height, width\), both even"):
        QuadrantWindow((4, 5))
    with pytest.raises(ValueError, match="shift is 4"):
        QuadrantWindow((4, 4), 4)
    with pytest.raises(ValueError, match="windows is 0"):
        SplitWindows((4, 4), (1, 0))
