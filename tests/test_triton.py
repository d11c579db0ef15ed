"""The Triton backend against `reference`: kernels on the GPU where there is one, else in the interpreter.

The interpreter is asked for here, before Triton is imported; it needs no GPU and shows what the kernels
compute, not how fast.
"""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch

import heedful
from heedful import patterns as p
from heedful.ops.bias import FactoredBias, alibi_bias, alibi_slopes
from heedful.selection import FULL, BlockTable, TokenGroups

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it comes with PyTorch for CUDA, or alone)", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from heedful.ops.backends.triton import bits as packed
from heedful.ops.backends.triton import lists
from heedful.ops.backends.triton.bands import Band, bands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA GPU here")


def inputs(b=1, hq=2, hkv=1, n=40, m=40, d=16, e=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, hq, n, d), (b, hkv, m, d), (b, hkv, m, e))
    return [torch.randn(s, generator=g).to(DEVICE, dtype).requires_grad_() for s in shapes]


def outcome(leaves, **kwargs):
    """Output, log-sum-exp and the gradients of a random functional of both, in float32."""
    out, lse = heedful.attention(*leaves[:3], return_lse=True, **kwargs)
    g = torch.Generator().manual_seed(7)
    finite = torch.where(lse == -math.inf, 0.0, lse)
    functional = (out.float() * torch.randn(out.shape, generator=g).to(DEVICE)).sum()
    functional = functional + (finite.float() * torch.randn(lse.shape, generator=g).to(DEVICE)).sum()
    return [x.float() for x in (out, lse, *torch.autograd.grad(functional, leaves))]


def agree(leaves, tolerance=2e-5, **kwargs):
    """Forward and backward equal those of `reference` in float64; infinities in the same places, no NaN."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wide = dict(kwargs)
    at = 3
    if "bias" in kwargs:
        wide["bias"] = FactoredBias(exact[3], exact[4])
        at = 5
    if "sink_logits" in kwargs:
        wide["sink_logits"] = exact[at]
    want = outcome(exact, backend="reference", **wide)
    got = outcome(leaves, backend="triton", **kwargs)
    for a, b in zip(got, want, strict=True):
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite])
        size = b[finite].abs().max().clamp(min=1.0) if finite.any() else 1.0
        assert ((a[finite] - b[finite]).abs() <= tolerance * size).all()


def scattered(n, m, leading, size, mask_fn=None, seed=0):
    """A random block table with full and partial tiles that differ by batch row and head."""
    g = torch.Generator().manual_seed(seed)
    some = torch.rand(*leading, -(-n // size[0]), -(-m // size[1]), generator=g) > 0.4
    every = torch.rand(some.shape, generator=g) > 0.5
    if mask_fn is None:

        def mask_fn(b, h, q, k):
            return (q + k + b + h) % 3 != 0

    return BlockTable.from_tiles(some.to(DEVICE), every.to(DEVICE), size, (n, m), mask_fn)


PATTERNS = {
    "all": None,
    "causal": p.Causal(),
    "window": p.Window(3, 5),
    "window and sink": p.Causal() & (p.Window(4) | p.Sink(3)),
    "dilated": p.Window(3, dilation=2),
    "blind": p.Window(2) & ~p.Window(1),
    "nothing": p.Causal() & ~p.Causal(),
    "per head": p.PerHead([p.Causal(), p.Window(4)]),
    "neighborhood": p.Neighborhood((5, 8), (3, 5)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name):
    agree(inputs(), pattern=PATTERNS[name])


@pytest.mark.parametrize("shape", [(1, 40), (40, 9), (130, 150)])
def test_lengths_that_fit_no_block(shape):
    """Query i stands at position i + m - n: rows before position 0 see nothing."""
    n, m = shape
    agree(inputs(1, 1, 1, n, m), pattern=p.Causal() & (p.Window(20) | p.Sink(2)))


def test_query_offset():
    for pattern in (p.Causal(), p.Causal() & ~p.Window(2)):
        agree(inputs(n=12), pattern=pattern, query_offset=9)


@pytest.mark.parametrize(
    ("leading", "heads", "size"),
    [
        ((1, 1), (4, 2), (16, 32)),
        ((1, 4), (4, 2), (64, 16)),
        ((2, 3), (3, 3), (32, 20)),
        ((2, 1), (2, 1), (11, 64)),
    ],
)
def test_tables(leading, heads, size):
    table = scattered(30, 50, leading, size)
    agree(inputs(leading[0], *heads, n=30, m=50), pattern=table)


def test_full_overrides_the_mask():
    table = scattered(40, 40, (1, 2), (16, 16), mask_fn=lambda b, h, q, k: (q < 0) & (k < 0))
    dense = table.dense()
    assert 0 < dense.float().mean() < 1  # partial tiles are empty, full ones are not
    agree(inputs(), pattern=table)


def test_table_of_a_pattern_method_is_compared_not_packed():
    table = scattered(48, 48, (1, 2), (16, 16), mask_fn=p.Causal().visible)
    made = lists.table_lists(table, 2)
    assert made.bits is None and made.bands == (Band(high=0),)
    agree(inputs(n=48, m=48), pattern=table)


def test_entries_past_count_mean_nothing():
    table = scattered(48, 48, (1, 1), (16, 16))
    live = torch.arange(table.index.shape[-1], device=DEVICE) < table.count[..., None]
    noise = BlockTable(
        table.count,
        table.index.masked_fill(~live, 1 << 40),
        table.kind.masked_fill(~live, FULL),
        table.block_size,
        table.shape,
        table.mask_fn,
    )
    leaves = inputs(n=48, m=48)
    for a, b in zip(
        outcome(leaves, pattern=noise, backend="triton"),
        outcome(leaves, pattern=table, backend="triton"),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("widths", [(32, 32), (24, 40), (80, 16), (7, 130), (256, 256)])
def test_widths(widths):
    agree(inputs(1, 1, 1, 33, 33, *widths), pattern=p.Causal())


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Errors are those of rounding inputs, weights and outputs."""
    agree(
        inputs(dtype=dtype, n=70, m=70, hkv=2), 1e-2 if dtype == torch.float16 else 4e-2, pattern=p.Causal()
    )


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scale(scale):
    agree(inputs(), pattern=p.Causal(), scale=scale)


def test_key_mask():
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[1] = False
    mask[0, :9] = False
    for pattern in (None, p.Window(4)):
        agree(inputs(2), pattern=pattern, key_mask=mask.to(DEVICE))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_hidden_keys_with_huge_logits_harm_nothing():
    query, key, value = inputs()
    mask = torch.ones(1, 40, dtype=torch.bool, device=DEVICE)
    mask[:, 5] = False
    with torch.no_grad():
        key[:, :, 5] *= 1e18
    agree([query, key, value], pattern=p.Causal(), key_mask=mask)


@pytest.mark.parametrize("pattern", [None, p.Causal() & ~p.Causal()])
def test_sink(pattern):
    sink = torch.tensor([0.7, -2.0], device=DEVICE, requires_grad=True)
    agree([*inputs(), sink], pattern=pattern, sink_logits=sink)


@pytest.mark.parametrize(
    ("heads", "query_lead", "key_lead"),
    [((2, 1), (1, 2), (1, 1)), ((2, 2), (2, 2), (1, 2)), ((3, 3), (1, 1), (2, 1))],
)
def test_factored_bias(heads, query_lead, key_lead):
    g = torch.Generator().manual_seed(3)
    factors = [
        torch.randn(*lead, 40, 3, generator=g).to(DEVICE).requires_grad_() for lead in (query_lead, key_lead)
    ]
    agree([*inputs(2, *heads), *factors], pattern=p.Causal(), bias=FactoredBias(*factors))


def test_alibi_in_half_precision_is_exact_over_long_distances():
    """Positions beyond 256 do not fit into bfloat16; the factors must not be rounded."""
    n = 300
    query, key, value = inputs(1, 2, 2, n, n, dtype=torch.bfloat16)
    bias = alibi_bias(alibi_slopes(2).to(DEVICE), n)
    exact = heedful.attention(
        query.double(), key.double(), value.double(), bias=bias.dense().double(), pattern=p.Causal()
    )
    out = heedful.attention(query, key, value, bias=bias, pattern=p.Causal(), backend="triton")
    assert (out.double() - exact).abs().max() < 2e-2


def test_views_are_read_in_place():
    leaves = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs(hkv=2)]
    agree(leaves, pattern=p.Causal())
    agree([leaves[0], leaves[1], leaves[1].detach()[..., ::2].requires_grad_()], pattern=p.Causal())


def test_key_blocks_that_everyone_sees_are_cut_into_pieces(monkeypatch):
    """Pieces are added in a fixed order: two passes give the same bits."""
    monkeypatch.setattr(lists, "_PIECE", 2)
    some = torch.zeros(1, 2, 3, 8, dtype=torch.bool)
    some[..., 0] = True  # everyone's key block
    some[:, 0].diagonal(dim1=-2, dim2=-1)[:] = True
    some[:, 1, :, 5] = True
    for heads in (1, 2):
        every = torch.zeros(1, heads, 3, 8, dtype=torch.bool)
        table = BlockTable.from_tiles(
            some[:, :heads].to(DEVICE), every.to(DEVICE), (16, 16), (48, 128), p.Window(90, 20).visible
        )
        made = lists.table_lists(table, 2).columns
        assert (made.spares[..., 1] > 1).any() and (made.items[..., 0] < 0).any()
        leaves = inputs(1, 2, 1, 48, 128)
        agree(leaves, pattern=table)
        first, second = (outcome(leaves, pattern=table, backend="triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    lists.pattern_lists.cache_clear()
    made = lists.pattern_lists(p.Causal() & p.Sink(3), 40 * 128, 40 * 128, 0, 1, torch.device("cpu")).columns
    assert made.spare_count == 20 and made.items.shape[2] == 39 + 20
    lists.pattern_lists.cache_clear()


def test_lists_name_every_tile_once():
    table = scattered(50, 70, (2, 4), (8, 16))
    made = lists.table_lists(table, 2)
    bounds, entry = made.rows.bounds, made.rows.entry
    (items, columns), blocks = (made.columns.items, made.columns.entry), made.blocks
    for b in range(2):
        want = {
            (h, i, int(j))
            for h in range(4)
            for i in range(blocks[0])
            for j in table.index[b, h, i, : table.count[b, h, i]]
        }
        rows = [
            (h, i, int(j))
            for h in range(4)
            for i in range(blocks[0])
            for j in entry[b, h, bounds[b, h, i, 0] : bounds[b, h, i, 2]]
        ]
        turned = [
            (2 * g + int(x) // blocks[0], int(x) % blocks[0], int(j))
            for g in range(2)
            for j, begin, _, end, _ in items[b, g]
            for x in columns[b, g, begin:end]
            if j >= 0
        ]
        for found in (rows, turned):
            assert len(found) == len(want) and set(found) == want


def test_bands_are_the_pattern():
    causal, window, sink = p.Causal(), p.Window(4, 2), p.Sink(3)
    n = torch.arange(20)
    q, k = n[:, None], n
    for pattern in (
        p.Full(),
        causal,
        window,
        sink,
        causal & (window | sink),
        window & causal,
        sink & causal,
        p.SinkWindow(3, 5),
    ):
        found = bands(pattern)
        assert found is not None
        seen = sum(((k - q >= x.low) & (k - q <= x.high) & (k < x.end)).int() for x in found) > 0
        assert torch.equal(seen, pattern.mask(20)[0, 0])
    for pattern in (~causal, p.Window(4, dilation=2), causal | window | sink, p.Documents((20,)) & causal):
        assert bands(pattern) is None
    nothing = bands(p.Window(3, 0) & p.Sink(0))
    assert nothing is not None and not (k - q <= nothing[0].high).any()


def test_packed_masks_are_kept_once_each():
    table = p.Window(3, dilation=2).block_table(640, block_size=(32, 64))
    partial = (torch.arange(table.index.shape[-1]) < table.count[..., None]) & (table.kind != FULL)
    for relative in (False, True):
        made = packed.pack(table, partial, relative)
        assert made is not None
        assert made.by_query.shape[0] < 12 < int(partial.sum())
        for b, h, i, slot in partial.nonzero().tolist():
            j, which = int(table.index[b, h, i, slot]), made.number[b, h, i, slot]
            row, column = (i * 32 + torch.arange(32))[:, None], j * 64 + torch.arange(64)
            want = table.mask_fn(torch.tensor(b), torch.tensor(h), row, column)
            c = torch.arange(64)
            got = (made.by_query[which][c // 32].T >> (c % 32)) & 1
            assert torch.equal(got.bool(), want)
            r = torch.arange(32)
            turned = (made.by_key[which][r // 32, :64].T >> (r % 32)) & 1
            assert torch.equal(turned.bool(), want.T)


def test_no_leak_from_the_future():
    leaves = inputs()
    out = heedful.attention(*leaves, pattern=p.Causal() & p.Window(9), backend="triton")
    grads = torch.autograd.grad(out[:, :, :25].sum(), leaves[1:])
    assert all((g[:, :, 25:] == 0).all() and (g[:, :, :25] != 0).any() for g in grads)


def test_double_backward_says_that_it_does_not():
    leaves = inputs()
    out = heedful.attention(*leaves, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(shape):
    out, lse = heedful.attention(*inputs(n=shape[0], m=shape[1]), return_lse=True, backend="triton")
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.door
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dropout_p": 0.5}, "has no dropout"),
        ({"bias": torch.zeros(40, 40)}, "no additive bias tensors"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"d": 257}, "up to 256"),
        ({"groups": True}, "no token groups"),
        ({"rank": 129}, "up to rank 128"),
    ],
)
def test_what_is_not_served_says_why(change, words):
    change = dict(change)
    leaves = inputs(d=change.pop("d", 16), dtype=change.pop("dtype", torch.float32))
    if change.pop("groups", False):
        row = torch.arange(40, device=DEVICE)[None, None, None]
        change["pattern"] = TokenGroups(row, row, (40, 40))
    if "rank" in change:
        factor = torch.zeros(1, 1, 40, change.pop("rank"), device=DEVICE)
        change["bias"] = FactoredBias(factor, factor)
    with pytest.raises(ValueError, match=words):
        heedful.attention(*leaves, backend="triton", **change)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *((torch.bfloat16, width) for width in (32, 64, 80, 128, 192, 256)),
        *((dtype, width) for dtype in (torch.float16, torch.float32) for width in (64, 128, 256)),
    ],
)
def test_on_the_gpu(dtype, width):
    """All kernels as compiled, at lengths of several blocks; large enough that nothing hides in one tile."""
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4}[dtype]
    leaves = inputs(2, 4, 2, 2048, 2048, width, width, dtype=dtype)
    mask = torch.rand(2, 2048, generator=torch.Generator().manual_seed(1)) > 0.1
    for pattern in (p.Causal() & (p.Window(300) | p.Sink(4)), p.Neighborhood((32, 64), (7, 7))):
        agree(leaves, tolerance, pattern=pattern, key_mask=mask.to(DEVICE))
