"""Patterns against literal transcriptions of their definitions, and the laws of their algebra."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from heedful import patterns as p
from heedful.patterns.pattern import And, Not, Or, Pattern

CPU = torch.device("cpu")


# -- the definitions, pair by pair, in plain Python ----------------------------------------------------


def coordinates(shape: tuple[int, ...], token: int) -> tuple[int, ...]:
    return list(itertools.product(*(range(s) for s in shape)))[token]


def neighborhood_axis(length: int, w: int, s: int, d: int, causal: bool, q: int) -> list[int]:
    """The keys of the query at q: the card's centre form, on the list of tokens of q's residue."""
    group = [x for x in range(length) if x % d == q % d]
    a, n = group.index(q), len(group)
    if causal:
        leader = min((a // s) * s + s - 1, n - 1)
        return [group[b] for b in range(a + 1) if leader - b < w]
    leader = min((a // s) * s + s // 2, n - 1)
    left, right = w // 2, w // 2 + w % 2 - 1
    centre = max(left, min(leader, n - 1 - right))
    return group[centre - left : centre + right + 1]


def blocks_axis(length: int, size: int, shift: int) -> list[list[int]]:
    borders = [0, *(x for x in range(1, length) if x % size == shift), length]
    return [list(range(a, b)) for a, b in itertools.pairwise(borders)]


def sees_axis(pattern: Pattern, axis: int, q: int, k: int) -> bool:
    length = pattern.shape[axis]
    match pattern:
        case p.Neighborhood():
            args = (x[axis] for x in (pattern.window, pattern.stride, pattern.dilation, pattern.causal))
            return k in neighborhood_axis(length, *args, q)
        case p.Blocks():
            cut = blocks_axis(length, pattern.size[axis], pattern.shift[axis])
            return any(q in block and k in block for block in cut)
        case p.Halo():
            block, halo = pattern.block[axis], pattern.halo[axis]
            return any(abs(k - x) <= halo for x in range(q // block * block, (q // block + 1) * block))
        case p.Grid():
            spread = length // pattern.grid[axis]
            return k in range(q % spread, length, spread)
    raise AssertionError(pattern)


def sees(pattern: Pattern, b: int, h: int, q: int, k: int) -> bool:
    match pattern:
        case And():
            return sees(pattern.left, b, h, q, k) and sees(pattern.right, b, h, q, k)
        case Or():
            return sees(pattern.left, b, h, q, k) or sees(pattern.right, b, h, q, k)
        case Not():
            return not sees(pattern.inner, b, h, q, k)
        case p.PerHead():
            members = pattern.members
            return sees(members[h if len(members) > 1 else 0], b, 0, q, k)
        case p.Full():
            return True
        case p.Causal():
            return k <= q
        case p.Sink():
            return k in range(pattern.tokens)
        case p.Window():
            return any(k == q + pattern.dilation * j for j in range(-pattern.before, pattern.after + 1))
        case p.Strided():
            return any(k == q + pattern.stride * j for j in range(-200, 201))
        case p.Global():
            tokens = pattern.tokens if isinstance(pattern.tokens, tuple) else range(pattern.tokens)
            return q in tokens or k in tokens
        case p.PrefixLM():
            return k <= q or k in range(pattern.prefix)
        case p.Documents():
            nested = isinstance(pattern.lengths[0], tuple)
            lengths = pattern.lengths[b if len(pattern.lengths) > 1 else 0] if nested else pattern.lengths
            start = 0
            for length in lengths:
                if q in range(start, start + length):
                    return k in range(start, start + length)
                start += length
            return False
    place_q, place_k = coordinates(pattern.shape, q), coordinates(pattern.shape, k)
    return all(sees_axis(pattern, i, a, b) for i, (a, b) in enumerate(zip(place_q, place_k, strict=True)))


def defined(pattern: Pattern, n: int, m: int, offset: int) -> torch.Tensor:
    rows = [
        [
            [[sees(pattern, b, h, i + offset, k) for k in range(m)] for i in range(n)]
            for h in range(pattern.heads)
        ]
        for b in range(pattern.batch)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(pattern.batch, pattern.heads, n, m)


# -- random patterns ----------------------------------------------------------------------------------


@st.composite
def grids(draw) -> tuple[int, ...]:
    longest = draw(st.sampled_from([(24,), (6, 6), (3, 3, 4)]))
    return tuple(draw(st.integers(1, s)) for s in longest)


def by_axis(draw, shape, strategy):
    return tuple(draw(strategy(length)) for length in shape)


@st.composite
def neighborhoods(draw, shape: tuple[int, ...]) -> Pattern:
    dilation = by_axis(draw, shape, lambda s: st.integers(1, s))
    window = tuple(draw(st.integers(1, s // d)) for s, d in zip(shape, dilation, strict=True))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    causal = by_axis(draw, shape, lambda s: st.booleans())
    return p.Neighborhood(shape, window, stride, dilation, causal)


@st.composite
def blocks(draw, shape: tuple[int, ...]) -> Pattern:
    size = by_axis(draw, shape, lambda s: st.integers(1, s + 2))
    return p.Blocks(shape, size, tuple(draw(st.integers(0, s - 1)) for s in size))


@st.composite
def halos(draw, shape: tuple[int, ...]) -> Pattern:
    block = by_axis(draw, shape, lambda s: st.integers(1, s + 1))
    return p.Halo(shape, block, by_axis(draw, shape, lambda s: st.integers(0, s)))


@st.composite
def spread(draw, shape: tuple[int, ...]) -> Pattern:
    return p.Grid(
        shape, by_axis(draw, shape, lambda s: st.sampled_from([g for g in range(1, s + 1) if s % g == 0]))
    )


def on_grid(shape: tuple[int, ...]) -> st.SearchStrategy[Pattern]:
    return st.one_of(neighborhoods(shape), blocks(shape), halos(shape), spread(shape))


@st.composite
def packed(draw, m: int, batch: int | None = None) -> tuple[int, ...]:
    cuts = sorted(draw(st.sets(st.integers(1, m), min_size=1, max_size=4)))
    return tuple(b - a for a, b in itertools.pairwise([0, *cuts]))


def on_line(m: int) -> st.SearchStrategy[Pattern]:
    few = st.integers(0, m + 2)
    return st.one_of(
        st.just(p.Full()),
        st.just(p.Causal()),
        st.builds(p.Sink, few),
        st.builds(p.Window, few, few, st.integers(1, 5)),
        st.builds(p.Strided, st.integers(1, m + 1)),
        st.builds(p.Global, few | st.sets(st.integers(0, m + 1), max_size=4).map(tuple)),
        st.builds(p.PrefixLM, few),
        st.builds(p.Documents, packed(m) | st.tuples(packed(m), packed(m))),
    )


@st.composite
def calls(draw, expressions: bool = True, grid: bool | None = None):
    """A pattern, n, m and the offset; n != m and offsets included."""
    shape = draw(grids())
    m = math.prod(shape)
    if draw(st.booleans()) if grid is None else grid:
        leaves = on_grid(shape) | on_line(m) if expressions else on_grid(shape)
        n = draw(st.integers(1, m))
        offset = draw(st.integers(0, m - n) | st.just(m - n))
    else:
        leaves = on_line(m)
        n = draw(st.integers(1, 24))
        offset = draw(st.just(m - n) | st.integers(-5, m + 5))
    if expressions:
        joined = st.recursive(
            leaves,
            lambda inner: st.builds(And, inner, inner) | st.builds(Or, inner, inner) | st.builds(Not, inner),
            max_leaves=4,
        )
        leaves = joined | st.lists(joined, min_size=1, max_size=3).map(p.PerHead)
    return draw(leaves), n, m, offset


@st.composite
def self_calls(draw):
    """A pattern that falls apart into groups, over the whole of its tokens."""
    shape = draw(grids())
    m = math.prod(shape)
    return draw(on_grid(shape)), m


def mask(pattern: Pattern, n: int, m: int, offset: int) -> torch.Tensor:
    found = pattern.mask(n, m, query_offset=offset)
    assert found.shape == (pattern.batch, pattern.heads, n, m)
    return found


# -- definitions --------------------------------------------------------------------------------------


@given(calls())
def test_mask_is_the_definition(call) -> None:
    pattern, n, m, offset = call
    assert torch.equal(mask(*call), defined(pattern, n, m, offset))


@given(calls(expressions=False, grid=True))
def test_mask_of_a_grid_is_the_definition(call) -> None:
    pattern, n, m, offset = call
    assert torch.equal(mask(*call), defined(pattern, n, m, offset))


@given(calls())
def test_mask_mod_under_vmap(call) -> None:
    pattern, n, m, offset = call
    fn = pattern.mask_mod(offset)
    for out in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        fn = torch.vmap(fn, in_dims=out)
    axes = (torch.arange(s) for s in (pattern.batch, pattern.heads, n, m))
    assert torch.equal(fn(*axes), mask(*call))


@pytest.mark.parametrize(
    "pattern",
    [
        p.Neighborhood((4, 5), (2, 3), (2, 1), 1, (True, False)),
        p.Blocks((4, 5), 2, 1),
        p.Documents(((3, 9), (12, 5))),
        p.Global((3, 7)),
        p.PerHead([p.Causal(), p.Documents(((3, 9), (12, 5)))]),
    ],
    ids=str,
)
def test_mask_mod_in_flex_attention(pattern: Pattern) -> None:
    found = create_mask(pattern.mask_mod(), pattern.batch, pattern.heads, 20, 20, device="cpu")
    assert torch.equal(found, pattern.mask(20))


@pytest.mark.door  # run-time shape checks cannot be traced
@pytest.mark.parametrize(
    "pattern",
    [
        p.Neighborhood((4, 5), (2, 3), (2, 1), 1, (True, False)),
        p.Documents((3, 9, 2)),
        p.Documents(((3, 9), (12, 5))),
        p.Global((3, 7)),
        p.PerHead([p.Causal(), p.Strided(3)]),
    ],
    ids=str,
)
def test_mask_mod_is_traced_whole(pattern: Pattern) -> None:
    """Tables enter a compiled graph as inputs; nothing is built inside, which kernels could not do."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    b, h, q, k = (
        torch.arange(s).view([-1 if i == axis else 1 for i in range(4)])
        for axis, s in enumerate((pattern.batch, pattern.heads, 20, 20))
    )
    torch._dynamo.reset()
    found = torch.compile(pattern.mask_mod(), backend=keep, fullgraph=True)(b, h, q, k)
    assert torch.equal(found.expand_as(pattern.mask(20)), pattern.mask(20))
    calls = {
        str(node.target) for node in graphs[0].graph.nodes if node.op in ("call_function", "call_method")
    }
    assert not calls & {"to", "cumsum"}
    assert not any("tensor" in call or "arange" in call for call in calls)


# -- tiles, tables, groups, density -------------------------------------------------------------------


@given(calls(), st.integers(1, 9), st.integers(1, 9))
def test_tiles_and_block_table(call, bq: int, bk: int) -> None:
    pattern, n, m, offset = call
    expected = mask(*call)
    q_lo, k_lo = torch.arange(0, n, bq), torch.arange(0, m, bk)
    q_hi, k_hi = (q_lo + bq).clamp(max=n) - 1, (k_lo + bk).clamp(max=m) - 1
    some, every = pattern.tiles(q_lo[:, None] + offset, q_hi[:, None] + offset, k_lo[None], k_hi[None])
    tiles = [
        [expected[:, :, a : b + 1, c : d + 1].flatten(2) for c, d in zip(k_lo, k_hi, strict=True)]
        for a, b in zip(q_lo, q_hi, strict=True)
    ]
    any_seen = torch.stack([torch.stack([t.any(-1) for t in row], -1) for row in tiles], -2)
    all_seen = torch.stack([torch.stack([t.all(-1) for t in row], -1) for row in tiles], -2)
    assert not (any_seen & ~some).any()
    assert not (every & ~all_seen).any()
    if pattern.exact_tiles:
        assert torch.equal(some.expand_as(any_seen), any_seen)
        assert torch.equal(every.expand_as(all_seen), all_seen)

    table = pattern.block_table(n, m, block_size=(bq, bk), query_offset=offset)
    assert torch.equal(table.dense(), expected)
    assert torch.equal(table.count, any_seen.sum(-1))
    live = torch.arange(table.index.shape[-1]) < table.count[..., None]
    assert int((table.kind * live).sum()) == int((all_seen & any_seen).sum())


def assert_groups(pattern: Pattern, n: int, m: int, offset: int) -> None:
    expected = mask(pattern, n, m, offset)
    found = pattern.groups(n, m, offset, CPU)
    assert found is not None
    assert found.shape == (n, m)
    dense = found.dense(pattern.batch, pattern.heads)
    assert torch.equal(dense & expected, expected)  # no visible pair is lost ...
    assert torch.equal(dense, expected)  # ... and none is added
    # Every pair lies in one group only, and every query too.
    assert int(found.pair_mask().expand(*dense.shape[:2], -1, -1, -1).sum()) == int(expected.sum())
    queries = found.query_index[found.query_index >= 0]
    assert len(queries) == len(queries.unique())
    if found.mask_fn is None:
        live = (found.query_index >= 0).sum(-1) * (found.key_index >= 0).sum(-1)
        assert int(live.sum()) == int(expected[0, 0].sum())


@given(self_calls())
def test_groups_of_grids(call) -> None:
    pattern, m = call
    if pattern.groups(m, m, 0, CPU) is None:
        # Only a plain one-dimensional window, whose block table serves better.
        assert isinstance(pattern, p.Neighborhood)
        assert len(pattern.shape) == 1
        assert pattern.stride == pattern.dilation == (1,)
    else:
        assert_groups(pattern, m, m, 0)
        if isinstance(pattern, p.Blocks | p.Halo | p.Grid):
            assert pattern.groups(m, m, 0, CPU).mask_fn is None
    if m > 1:
        assert pattern.groups(m - 1, m, 1, CPU) is None


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(-9, 35),
    st.integers(2, 9),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_groups_on_a_line(n: int, m: int, offset: int, step: int, before: int, after: int) -> None:
    assert_groups(p.Strided(step), n, m, offset)
    assert_groups(p.Window(before, after, step), n, m, offset)
    assert p.Strided(step).groups(n, m, offset, CPU).mask_fn is None


def test_groups_of_many_tiles() -> None:
    assert_groups(p.Window(3, 1, dilation=2), 700, 700, 0)
    assert_groups(p.Strided(2), 2400, 2400, 0)
    assert_groups(p.Neighborhood((30, 20), (7, 4), (1, 2), (2, 1), (False, True)), 600, 600, 0)
    assert_groups(p.Neighborhood(500, 20, 5), 500, 500, 0)
    assert_groups(p.Neighborhood((9, 10, 11), (3, 4, 5)), 990, 990, 0)


@given(self_calls(), st.sampled_from([p.Causal(), p.Sink(2), p.PerHead([p.Causal(), p.Window(2)])]))
def test_groups_of_an_intersection(call, other: Pattern) -> None:
    pattern, m = call
    if pattern.groups(m, m, 0, CPU) is not None:
        joined = other & pattern
        found = joined.groups(m, m, 0, CPU)
        assert torch.equal(found.dense(joined.batch, joined.heads), joined.mask(m))


def test_groups_skip_keys() -> None:
    """A group holds the union of its queries' windows and no more."""
    found = p.Neighborhood((64, 64), 7).groups(4096, 4096, 0, CPU)
    assert found.query_index.shape == (1, 1, 64, 64)
    assert found.key_index.shape == (1, 1, 64, 14 * 14)
    blocked = p.Neighborhood((64, 64), 16, stride=16).groups(4096, 4096, 0, CPU)
    assert blocked.mask_fn is None
    assert blocked.key_index.shape == (1, 1, 16, 256)


@given(calls())
def test_density(call) -> None:
    pattern, n, m, offset = call
    expected = mask(*call).double().mean().item()
    assert pattern.density(n, m, query_offset=offset) == pytest.approx(expected, abs=1e-12)


def test_published_densities() -> None:
    """Kept shares that the authors of GNA publish."""
    assert (
        p.Neighborhood(32768, 2048).axes[0].visible(torch.arange(7)[:, None], torch.arange(32768)).sum()
        == 7 * 2048
    )
    video = p.Neighborhood((30, 48, 80), (18, 24, 24), (16, 8, 8))
    rows = torch.tensor([0, 57001, 115199])[:, None]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    seen = video.visible(zero, zero, rows, torch.arange(115200)).sum(1)
    assert seen.tolist() == [10368] * 3
    assert round(10368 / 115200, 3) == 0.09


# -- algebra ------------------------------------------------------------------------------------------


@st.composite
def triples(draw):
    shape = draw(grids())
    m = math.prod(shape)
    leaves = on_grid(shape) | on_line(m)
    return tuple(draw(leaves) for _ in range(3)), m


@settings(max_examples=12)
@given(triples())
def test_set_laws(drawn) -> None:
    (a, b, c), m = drawn

    def same(left: Pattern, right: Pattern) -> bool:
        seen = torch.broadcast_tensors(left.mask(m), right.mask(m))
        tables = (x.block_table(m, block_size=(3, 4)).dense() for x in (left, right))
        return torch.equal(*seen) and torch.equal(*torch.broadcast_tensors(*tables))

    assert same(~(a & b), ~a | ~b)
    assert same(~(a | b), ~a & ~b)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(a | (b & c), (a | b) & (a | c))
    assert same(a & a, a)
    assert same(a | a, a)
    assert same(~~a, a)
    assert same(a & ~a, ~p.Full())
    assert same(a | ~a, p.Full())
    assert same(a & p.Full(), a)


def test_per_head_stacks() -> None:
    members = [p.Causal(), p.Window(2), p.Causal(), p.Documents(((3, 4), (6,)))]
    pattern = p.PerHead(members)
    assert (pattern.batch, pattern.heads) == (2, 4)
    expected = torch.cat([member.mask(8).expand(2, 1, 8, 8) for member in members], dim=1)
    assert torch.equal(pattern.mask(8), expected)
    table = pattern.block_table(8, block_size=(3, 3))
    assert table.count.shape == (2, 4, 3)
    assert torch.equal(table.dense(), expected)


def test_patterns_are_values() -> None:
    every = [
        p.Neighborhood((4, 6), 2, dilation=(1, 2)),
        p.Blocks((4, 6), (2, 3), 1),
        p.Halo((4, 6), 2, 1),
        p.Grid((4, 6), 2),
        p.Strided(3),
        p.Global([3, 1]),
        p.PrefixLM(3),
        p.Documents([[3, 4], [5]]),
        p.PerHead([p.Causal(), p.Strided(2)]),
    ]
    for pattern in every:
        twin = pickle.loads(pickle.dumps(pattern))
        assert twin == pattern
        assert hash(twin) == hash(pattern)
        assert type(pattern).__name__ in str(pattern)
        assert len(str(pattern)) < 60
        with pytest.raises(dataclasses.FrozenInstanceError):
            pattern.shape = 3
    assert p.Neighborhood(16, 4) == p.Neighborhood((16,), (4,), (1,), (1,), (False,))
    assert p.Global((1, 3)) == p.Global([3, 1, 3])
    assert str(p.Neighborhood((4, 6), 2, dilation=(1, 2))) == "Neighborhood(4x6, 2x2, dilation=1x2)"
    assert str(p.Blocks((4, 6), 2, (0, 1))) == "Blocks(4x6, 2x2, shift=0x1)"


# -- facts about neighborhood attention ---------------------------------------------------------------


def rows(pattern: Pattern, n: int) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in pattern.mask(n)[0, 0]]


def test_rows_of_the_reference() -> None:
    expected = [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    assert rows(p.Neighborhood(5, 3), 5) == expected
    seen = p.Neighborhood(5, 3).mask(5)[0, 0]
    assert not torch.equal(seen, seen.T)  # borders are not symmetric


def test_even_windows_lean_left_and_strides_right() -> None:
    assert rows(p.Neighborhood(9, 4), 9)[4] == [2, 3, 4, 5]
    # Stride 4 has its leader at 4 + 4 // 2 = 6 for queries 4 to 7.
    assert rows(p.Neighborhood(16, 5, 4), 16)[4:8] == [[4, 5, 6, 7, 8]] * 4
    # The last stride group is cut short: its leader is the last token, not its own centre.
    assert rows(p.Neighborhood(10, 3, 3), 10)[9] == [7, 8, 9]


@given(grids().flatmap(neighborhoods))
def test_rows_have_the_whole_window(pattern: Pattern) -> None:
    pattern = dataclasses.replace(pattern, causal=False)
    counts = pattern.mask(math.prod(pattern.shape)).sum(-1)
    assert counts.unique().tolist() == [math.prod(pattern.window)]


@pytest.mark.parametrize(
    ("length", "window", "stride", "dilation"), [(11, 3, 1, 3), (13, 6, 3, 2), (17, 4, 2, 4)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_dilation_is_attention_on_each_residue(length, window, stride, dilation, causal) -> None:
    seen = p.Neighborhood(length, window, stride, dilation, causal).mask(length)[0, 0]
    rest = seen.clone()
    for residue in range(dilation):
        part = len(range(residue, length, dilation))
        inner = p.Neighborhood(part, window, stride, causal=causal).mask(part)[0, 0]
        assert torch.equal(seen[residue::dilation, residue::dilation], inner)
        rest[residue::dilation, residue::dilation] = False
    assert not rest.any()


def test_ends_of_the_spectrum() -> None:
    assert p.Neighborhood((4, 5), (4, 5)).mask(20).all()
    assert torch.equal(p.Neighborhood((4, 5), 1).mask(20)[0, 0], torch.eye(20).bool())
    assert torch.equal(p.Neighborhood(12, 4, causal=True).mask(12), (p.Causal() & p.Window(3)).mask(12))


@pytest.mark.parametrize("window", [3, 4])
def test_stride_of_a_window_is_blocks(window: int) -> None:
    shape = (3 * window, 2 * window)
    n = math.prod(shape)
    assert torch.equal(p.Neighborhood(shape, window, window).mask(n), p.Blocks(shape, window).mask(n))


def test_causal_strided_windows_shrink() -> None:
    counts = p.Neighborhood(16, 8, 4, causal=True).mask(16)[0, 0].sum(-1)
    # Past the first window, member j of a stride group sees w - (s - 1 - j) keys.
    assert counts[8:].tolist() == [5, 6, 7, 8, 5, 6, 7, 8]


def test_interior_is_translation_equivariant() -> None:
    seen = p.Neighborhood((9, 11), (3, 5)).mask(99).view(9, 11, 9, 11)
    assert torch.equal(seen[3, 4].roll((2, 1), (0, 1)), seen[5, 5])


@pytest.mark.parametrize(
    ("shape", "window", "stride", "dilation", "causal", "total", "least", "most"),
    [
        ((9,), 3, 1, 1, False, 27, 3, 3),
        ((9,), 4, 1, 1, True, 30, 1, 4),
        ((11,), 3, 1, 3, False, 33, 3, 3),
        ((13,), 6, 3, 2, False, 78, 6, 6),
        ((11,), 5, 3, 1, True, 39, 1, 5),
        ((16,), 8, 4, 1, True, 88, 1, 8),
        ((18,), 4, 2, 3, True, 51, 1, 4),
        ((6, 6), (3, 2), 1, (2, 3), (False, True), 162, 3, 6),
        ((8, 8), (5, 3), (5, 2), 1, (False, True), 720, 5, 15),
        ((9, 10), (3, 4), (2, 3), (3, 2), False, 1080, 12, 12),
        ((3, 4, 5), (2, 3, 4), (1, 2, 3), 1, (True, False, False), 1200, 12, 24),
        ((4, 6, 6), (2, 4, 3), (2, 2, 3), 1, False, 3456, 24, 24),
    ],
)
def test_counts_of_the_authors(shape, window, stride, dilation, causal, total, least, most) -> None:
    """Numbers of visible pairs, and fewest and most in a row, of the masks of the authors' code."""
    seen = p.Neighborhood(shape, window, stride, dilation, causal).mask(math.prod(shape)).sum(-1)
    assert (int(seen.sum()), int(seen.min()), int(seen.max())) == (total, least, most)


def test_facts_of_the_others() -> None:
    # Grid attention with grid = axis and blocks of the whole axis see everything.
    assert p.Grid((4, 6), (4, 6)).mask(24).all()
    assert p.Blocks((4, 6), (4, 6)).mask(24).all()
    # Halo 0 is non-overlapping windows; block 1 a centred window that is clipped at the borders.
    assert torch.equal(p.Halo((5, 6), 2, 0).mask(30), p.Blocks((5, 6), 2).mask(30))
    assert torch.equal(p.Halo(9, 1, 2).mask(9), p.Window(2).mask(9))
    # A prefix of 0 is causal, one over all tokens full.
    assert torch.equal(p.PrefixLM(0).mask(6), p.Causal().mask(6))
    assert p.PrefixLM(6).mask(6).all()
    # Decoding: the last rows of the mask.
    assert torch.equal(p.PrefixLM(3).mask(2, 9), p.PrefixLM(3).mask(9)[:, :, -2:])
    # Padding past the documents sees nothing and is seen by nobody.
    packed_rows = p.Documents((2, 3)).mask(7)[0, 0]
    assert not packed_rows[5:].any()
    assert not packed_rows[:, 5:].any()
    assert torch.equal(packed_rows[:5, :5], torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool())


def test_shifted_blocks_are_those_of_swin() -> None:
    """Cyclic shift, windows, and region labels that keep wrapped parts apart (Swin), rolled back."""
    height, width, size, shift = 8, 12, 4, 2
    label = torch.zeros(height, width, dtype=torch.int64)
    cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for i, (a, b) in enumerate(itertools.product(cuts, cuts)):
        label[a, b] = i
    window = torch.arange(height)[:, None] // size * (width // size) + torch.arange(width) // size
    key = (label * 100 + window).roll((shift, shift), (0, 1)).flatten()
    assert torch.equal(p.Blocks((height, width), size, shift).mask(96)[0, 0], key[:, None] == key)


# -- the door -----------------------------------------------------------------------------------------


@pytest.mark.door
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: p.Neighborhood(8, 3, dilation=3),
            "window is 3 and dilation 3, their product must be at most 8",
        ),
        (lambda: p.Neighborhood((8, 8), (3, 9)), "window is 9"),
        (lambda: p.Neighborhood(8, 3, 4), "stride is 4, must be at most window"),
        (lambda: p.Neighborhood(8, 3, 0), "stride is 0"),
        (lambda: p.Neighborhood(8, 0), "window is 0"),
        (lambda: p.Neighborhood((8, 8), (3, 3, 3)), "window is .3, 3, 3., must be one value or 2"),
        (lambda: p.Neighborhood((), 3), "shape is ()"),
        (lambda: p.Neighborhood((8, 0), 1), "shape is 0"),
        (lambda: p.Blocks(8, 0), "size is 0"),
        (lambda: p.Blocks(8, 4, 4), "shift is 4, must be at least 0 and less than size"),
        (lambda: p.Halo(8, 4, -1), "halo is -1"),
        (lambda: p.Grid(9, 2), "grid is 2, must divide the length of its axis, which is 9"),
        (lambda: p.Strided(0), "stride is 0"),
        (lambda: p.Global(-1), "tokens is -1"),
        (lambda: p.Global((2, -1)), "tokens is"),
        (lambda: p.PrefixLM(-1), "prefix is -1"),
        (lambda: p.Documents(()), "lengths is empty"),
        (lambda: p.Documents((3, 0)), "lengths is 0"),
        (lambda: p.PerHead([]), "members is empty"),
        (lambda: p.PerHead([p.PerHead([p.Full(), p.Full()])]), "must be for one"),
        (lambda: p.PerHead([p.Documents(((1,),) * 2), p.Documents(((1,),) * 3)]), "batch rows"),
    ],
)
def test_errors_at_construction(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.door
def test_errors_of_sizes() -> None:
    pattern = p.Neighborhood((4, 5), 2)
    with pytest.raises(ValueError, match="is for 20 keys, was given 21"):
        pattern.mask(21)
    with pytest.raises(ValueError, match="positions 15 to 22"):
        pattern.mask(8, 20, query_offset=15)
    with pytest.raises(ValueError, match="positions -1 to 6"):
        pattern.block_table(8, 20, query_offset=-1)
    with pytest.raises(ValueError, match="add up to 9, must be at most the number of keys, 8"):
        p.Documents(((3, 4), (9,))).mask(8)
    with pytest.raises(ValueError, match="is for 20 keys"):
        p.PerHead([p.Full(), pattern & p.Causal()]).mask(6)
