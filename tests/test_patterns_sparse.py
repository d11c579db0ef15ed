"""Sparse patterns for long sequences against literal loops over their cards, and the facts of the papers."""

from __future__ import annotations

import dataclasses
import math
import pickle
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import heedful
from heedful import patterns as p
from heedful.patterns.pattern import Pattern

CPU = torch.device("cpu")


# -- the definitions, pair by pair, in plain Python ----------------------------------------------------


def sees(pattern: Pattern, h: int, q: int, k: int) -> bool:
    if isinstance(pattern, p.RelativeStride):
        left, right = pattern.local_blocks
        i, j = q // pattern.block_size, k // pattern.block_size
        return (max(i - j - left + 1, 0) + max(j - i - right + 1, 0)) % pattern.stride == 0
    if k > q:
        return False
    if isinstance(pattern, p.SinkWindow):
        return k < pattern.sinks or q - k < pattern.window
    i, j = q // pattern.block_size, k // pattern.block_size
    match pattern:
        case p.Power():
            return j < pattern.sinks or i - j < pattern.window or i - j in [2**e for e in range(12)]
        case p.LocalStride():
            g = h // pattern.group
            if g >= pattern.kv_heads - pattern.dense_heads or 0 <= i - j < pattern.local_blocks:
                return True
            return (j + g * pattern.step + pattern.offset) % pattern.stride == 0
        case p.ElasticSpan():
            blocks = i + 1 if pattern.length is None else math.ceil(pattern.length / pattern.block_size)
            band = int(pattern.alpha[h] // pattern.block_size + pattern.beta[h] * blocks)
            # the authors build a symmetric band of this width and cut it at the diagonal
            return j * pattern.block_size < pattern.sink or 2 * (i - j) < max(2 * band - 1, 1)
    raise AssertionError(pattern)


def defined(pattern: Pattern, n: int, m: int, offset: int) -> torch.Tensor:
    rows = [
        [[sees(pattern, h, i + offset, k) for k in range(m)] for i in range(n)] for h in range(pattern.heads)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(1, pattern.heads, n, m)


SMALL = st.integers(1, 5)


@st.composite
def local_strides(draw) -> Pattern:
    kv_heads = draw(st.integers(1, 3))
    return p.LocalStride(
        kv_heads,
        draw(st.integers(1, 2)),
        draw(SMALL),
        draw(SMALL),
        draw(SMALL),
        draw(st.none() | SMALL),
        draw(st.integers(-2, 4)),
        draw(st.integers(0, kv_heads)),
    )


@st.composite
def elastic_spans(draw) -> Pattern:
    size, heads = draw(SMALL), draw(st.integers(1, 3))
    numbers = st.lists(st.integers(-20, 30), min_size=heads, max_size=heads)
    shares = st.lists(st.integers(0, 8).map(lambda x: x / 8), min_size=heads, max_size=heads)
    length = draw(st.none() | st.integers(1, 40))
    return p.ElasticSpan(
        tuple(draw(numbers)), tuple(draw(shares)), size * draw(st.integers(0, 3)), size, length
    )


PATTERNS = st.one_of(
    st.builds(p.Power, SMALL, st.integers(0, 3), SMALL),
    st.builds(p.SinkWindow, st.integers(0, 6), st.integers(1, 9)),
    local_strides(),
    st.builds(p.RelativeStride, SMALL, st.tuples(SMALL, SMALL), SMALL),
    elastic_spans(),
)


@st.composite
def calls(draw):
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return draw(PATTERNS), n, m, draw(st.just(m - n) | st.integers(-5, m + 5))


@given(calls(), st.integers(1, 9), st.integers(1, 9))
def test_mask_tiles_and_table_are_the_definition(call, bq: int, bk: int) -> None:
    pattern, n, m, offset = call
    expected = defined(*call)
    assert torch.equal(pattern.mask(n, m, query_offset=offset), expected)
    assert pattern.exact_tiles
    q_lo, k_lo = torch.arange(0, n, bq), torch.arange(0, m, bk)
    q_hi, k_hi = (q_lo + bq).clamp(max=n) - 1, (k_lo + bk).clamp(max=m) - 1
    some, every = pattern.tiles(q_lo[:, None] + offset, q_hi[:, None] + offset, k_lo[None], k_hi[None])
    shape = (1, pattern.heads, len(q_lo), len(k_lo))
    for i, (a, b) in enumerate(zip(q_lo, q_hi, strict=True)):
        for j, (c, d) in enumerate(zip(k_lo, k_hi, strict=True)):
            tile = expected[:, :, a : b + 1, c : d + 1].flatten(2)
            assert torch.equal(some.expand(shape)[..., i, j], tile.any(-1))
            assert torch.equal(every.expand(shape)[..., i, j], tile.all(-1))
    table = pattern.block_table(n, m, block_size=(bq, bk), query_offset=offset)
    assert torch.equal(table.dense(heads=pattern.heads), expected)


@pytest.mark.parametrize(
    "pattern",
    [
        p.Power(2, 1, 4),
        p.SinkWindow(3, 9),
        p.LocalStride(2, 2, 4, 2, 4),
        p.RelativeStride(4, 2, 3),
        p.ElasticSpan((4, -4, 8, 0), (0.0, 0.5, 0.25, 1.0), 4, 4),
    ],
    ids=str,
)
def test_attention_with_the_pattern(pattern: Pattern) -> None:
    q, k, v = (torch.randn(2, 4, 50, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    logits = (q @ k.mT / 8**0.5).masked_fill(~defined(pattern, 50, 50, 0), -torch.inf)
    expected = logits.softmax(-1) @ v
    weight = torch.randn_like(expected)
    want = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for backend in ("reference", "tiled"):
        out = heedful.attention(q, k, v, pattern=pattern, backend=backend)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), (q, k, v)), want)
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert hash(dataclasses.replace(pattern)) == hash(pattern)
    seen = torch.vmap(torch.vmap(pattern.mask_mod(), (None, None, None, 0)), (None, None, 0, None))
    ours = torch.stack(
        [seen(torch.tensor(0), torch.tensor(h), torch.arange(50), torch.arange(50)) for h in range(4)]
    )
    assert torch.equal(ours, defined(pattern, 50, 50, 0)[0].expand(4, -1, -1))


@pytest.mark.parametrize(
    "pattern",
    [
        p.Power(),
        p.Power(1, 0, 1),
        p.SinkWindow(4, 1020),
        p.LocalStride(4),
        p.RelativeStride(),
        p.ElasticSpan((0, 1024), (0.125, 0.0)),
    ],
    ids=str,
)
def test_tables_at_65536_tokens(pattern: Pattern) -> None:
    """No pair is looked at: at 4 billion of them this would take minutes."""
    begin = time.perf_counter()
    table = pattern.block_table(65536)
    assert time.perf_counter() - begin < 3
    assert table.count.shape == (1, pattern.heads, 512)
    # The rows of some query blocks, pair by pair.
    for block in (0, 1, 37, 511):
        q = torch.arange(block * 128, block * 128 + 128)[:, None]
        k = torch.arange(65536)
        for h in range(pattern.heads):
            seen = pattern.visible(torch.tensor(0), torch.tensor(h), q, k).view(128, 512, 128)
            many = int(table.count[0, h, block])
            assert table.index[0, h, block, :many].tolist() == seen.any(2).any(0).nonzero()[:, 0].tolist()
            assert torch.equal(
                table.kind[0, h, block, :many] > 0, seen.all(2).all(0)[table.index[0, h, block, :many]]
            )


# -- facts of the papers -------------------------------------------------------------------------------


def test_power_edges() -> None:
    edges = p.Power(1, 0, 1).mask(300)[0, 0]
    for q in (0, 1, 2, 5, 64, 299):
        assert (q - edges[q].nonzero()[:, 0]).tolist()[::-1] == [0] + [2**e for e in range(9) if 2**e <= q]
    assert int(edges.sum(1).max()) <= math.floor(math.log2(299)) + 2


def test_power_reaches_distance_x_in_popcount_layers() -> None:
    n = 130
    edges = p.Power(1, 0, 1).mask(n)[0, 0].float()
    reach, distance = torch.eye(n), torch.arange(n)[:, None] - torch.arange(n)
    for layers in range(1, 8):
        reach = ((reach @ edges) > 0).float()
        bits = torch.tensor([[max(int(x), 0).bit_count() for x in row] for row in distance])
        assert torch.equal(reach > 0, (distance >= 0) & (bits <= layers))
        assert (reach.bool() | (distance < 0) | (distance > 2**layers - 1)).all()


def test_power_at_32k() -> None:
    table = p.Power().block_table(32768, block_size=(256, 256))
    row = table.index[0, 0, -1, : table.count[0, 0, -1]].tolist()
    assert row == sorted([0, *(127 - d for d in (0, 1, 2, 3, 4, 8, 16, 32, 64))])
    assert len(row) == 10
    blocks = torch.arange(128)
    most = 1 + 5 + blocks.clamp(min=1).log2().floor() + 1
    assert (table.count[0, 0] <= most).all()
    assert 1 - len(row) / 128 == pytest.approx(0.92, abs=0.005)


def test_power_of_few_tokens_is_causal() -> None:
    assert torch.equal(p.Power(5, 1, 8).mask(40), p.Causal().mask(40))
    assert not torch.equal(p.Power(2, 0, 8).mask(40), p.Causal().mask(40))


def test_heads_of_local_stride_see_all_blocks_together() -> None:
    n, size = 200, 8
    for kv_heads, stride in ((8, 8), (8, 4), (6, 3)):
        seen = p.LocalStride(kv_heads, 1, size, 1, stride).mask(n)[0]
        for first in range(kv_heads - stride + 1):
            assert torch.equal(seen[first : first + stride].any(0), p.Causal().mask(n)[0, 0])
        assert not torch.equal(seen[: stride - 1].any(0), p.Causal().mask(n)[0, 0])  # one short is not enough
    # A stride that the heads do not divide leaves blocks out, as the card says.
    assert not torch.equal(p.LocalStride(4, 1, size, 1, 10).mask(n)[0].any(0), p.Causal().mask(n)[0, 0])
    # The same shard in all heads (heads=1) never covers.
    assert not torch.equal(p.LocalStride(1, 1, size, 1, 4).mask(n)[0].any(0), p.Causal().mask(n)[0, 0])


def test_local_stride_shards() -> None:
    """Head 0 keeps blocks 0, v, 2 v, ...; head 1 v - 1, 2 v - 1, ...; only head 0 has the first block."""
    seen = p.LocalStride(4, 1, 1, 1, 4).mask(32)[0, :, -1]
    assert seen[0].nonzero()[:, 0].tolist() == [*range(0, 32, 4), 31]
    assert seen[1].nonzero()[:, 0].tolist() == list(range(3, 32, 4))
    assert seen[:, 0].tolist() == [True, False, False, False]
    assert [p.LocalStride(k, g, stride=8).step for k, g in ((2, 1), (2, 2), (4, 4))] == [4, 2, 1]


def test_local_stride_never_needs_a_skipped_block_again() -> None:
    pattern = p.LocalStride(4, 1, 1, 3, 5, 2, 1, dense_heads=1)
    seen = pattern.mask(60)[0]
    for i in range(59):
        assert not (seen[:, i + 1, : i + 1] & ~seen[:, i, : i + 1]).any()
    assert seen.diagonal(dim1=1, dim2=2).all()


def test_local_stride_of_one_is_causal() -> None:
    assert torch.equal(p.LocalStride(2, 1, 8, 1, 1).mask(50), p.Causal().mask(50).expand(1, 2, 50, 50))
    dense = p.LocalStride(4, 1, 8, 1, 4, dense_heads=2).mask(50)[0]
    assert [torch.equal(d, p.Causal().mask(50)[0, 0]) for d in dense] == [False, False, True, True]


def test_sink_window_is_the_expression() -> None:
    joined = p.Causal() & (p.Sink(3) | p.Window(6))
    assert torch.equal(p.SinkWindow(3, 7).mask(40), joined.mask(40))
    assert torch.equal(p.SinkWindow(3, 37).mask(40), p.Causal().mask(40))


def test_elastic_span_at_its_ends() -> None:
    n = 50
    assert torch.equal(p.ElasticSpan(0, 1, 0, 4).mask(n), p.Causal().mask(n))
    assert torch.equal(p.ElasticSpan(0, 1, 0, 4, n).mask(n), p.Causal().mask(n))
    assert torch.equal(p.ElasticSpan(9, 0, 4, 1).mask(n), p.SinkWindow(4, 9).mask(n))
    # n_band counts the query's own block
    assert p.ElasticSpan(8, 0, 0, 4).mask(n)[0, 0, 47].nonzero()[:, 0].tolist() == list(range(40, 48))


def test_elastic_span_grows_with_the_length() -> None:
    rule = p.ElasticSpan((0, 8), (0.5, 0.25), 0, 4)
    assert rule.spans(4).tolist() == [2, 3]
    assert rule.spans(16).tolist() == [8, 6]
    for n in (16, 48, 64):
        last = rule.mask(n)[0, :, -1].sum(-1)
        fixed = p.ElasticSpan((0, 8), (0.5, 0.25), 0, 4, n).mask(n)[0, :, -1].sum(-1)
        assert last.tolist() == fixed.tolist() == (rule.spans(n // 4) * 4).tolist()
    # The longer text leaves the rows of the shorter one as they are.
    assert torch.equal(rule.mask(64)[:, :, :48, :48], rule.mask(48))


def test_elastic_span_densities_and_cache() -> None:
    rule = p.ElasticSpan((32,), (0.0,), 4, 1)
    rows = rule.mask(128)[0, 0].sum(1)
    assert rule.kv_density(128).item() == rows.max().item() / 128 == 36 / 128
    many = p.ElasticSpan((0, 64, 512, -256), (0.0, 0.25, 0.0, 0.75))
    seen = many.mask(1000)[0].sum(-1).amax(-1)
    assert ((many.kv_density(1024) * 1024 - seen).abs() < 64).all()
    size, static = many.cache_sizes(4024)
    assert size.tolist() == [128, 1088, 512, 2816]  # 64 + 1006 = 1070 and -256 + 3018 = 2762, to whole blocks
    assert static.tolist() == [64] * 4
    assert many.cache_sizes(40)[0].tolist() == [128] * 4


@pytest.mark.door
def test_door() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        p.Power(0)
    with pytest.raises(ValueError, match="sinks is -1"):
        p.Power(sinks=-1)
    with pytest.raises(ValueError, match="sinks is -1"):
        p.SinkWindow(-1, 4)
    with pytest.raises(ValueError, match="local_blocks is 0"):
        p.LocalStride(4, local_blocks=0)
    with pytest.raises(ValueError, match="kv_heads is 0"):
        p.LocalStride(0)
    with pytest.raises(ValueError, match="dense_heads is 5"):
        p.LocalStride(4, dense_heads=5)
    with pytest.raises(ValueError, match="must be one number or two"):
        p.RelativeStride(local_blocks=(1, 2, 3))
    with pytest.raises(ValueError, match=r"beta is \[1\.5\]"):
        p.ElasticSpan(0, 1.5)
    with pytest.raises(ValueError, match="alpha has 2 numbers"):
        p.ElasticSpan((1, 2), (0.0, 0.5, 1.0))
    with pytest.raises(ValueError, match="sink is 65"):
        p.ElasticSpan(0, 0.5, 65)
