"""`heedful.attention`: every backend against literal loops, forward and backward, in float64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import heedful
from heedful import patterns as p
from heedful.ops.attention import BACKENDS
from heedful.ops.backends.tiled import plan as tiled_plan
from heedful.ops.bias import alibi_bias, alibi_slopes
from heedful.patterns.local_stride import LocalStride
from heedful.selection import BlockTable, TokenGroups

DTYPE = torch.float64


def inputs(b=2, hq=4, hkv=2, n=13, m=13, d=6, e=6, seed=0, dtype=DTYPE):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, hq, n, d), (b, hkv, m, d), (b, hkv, m, e))
    return [torch.randn(s, generator=g, dtype=DTYPE).to(dtype).requires_grad_() for s in shapes]


def loops(query, key, value, visible, scale, bias=None, sink=None):
    """The definition, one row at a time."""
    b, hq, n, _ = query.shape
    m, repeats = key.shape[2], hq // key.shape[1]
    out = torch.zeros(b, hq, n, value.shape[-1], dtype=query.dtype)
    lse = torch.full((b, hq, n), -math.inf, dtype=query.dtype)
    for ib in range(b):
        for ih in range(hq):
            k, v = key[ib, ih // repeats], value[ib, ih // repeats]
            for i in range(n):
                seen = [j for j in range(m) if visible(ib, ih, i, j)]
                logits = [scale * (query[ib, ih, i] @ k[j]) for j in seen]
                if bias is not None:
                    logits = [
                        x + bias.expand(b, hq, n, m)[ib, ih, i, j] for x, j in zip(logits, seen, strict=True)
                    ]
                extra = [] if sink is None else [sink[ih]]
                if not logits + extra:
                    continue
                total = sum(x.exp() for x in logits + extra)
                lse[ib, ih, i] = total.log()
                if logits:
                    out[ib, ih, i] = sum(x.exp() * v[j] for x, j in zip(logits, seen, strict=True)) / total
    return out, lse


def outcome(leaves, **kwargs):
    """Output, log-sum-exp and the gradients of a random functional of both."""
    query, key, value = leaves[:3]
    out, lse = heedful.attention(query, key, value, return_lse=True, **kwargs)
    g = torch.Generator().manual_seed(7)
    functional = (out * torch.randn(out.shape, generator=g, dtype=DTYPE).to(out.dtype)).sum()
    finite = torch.where(lse == -math.inf, 0.0, lse)
    functional = functional + (finite * torch.randn(lse.shape, generator=g, dtype=DTYPE).to(lse.dtype)).sum()
    grads = torch.autograd.grad(functional, leaves, allow_unused=True)
    return [out, lse, *(torch.zeros(()) if x is None else x for x in grads)]


def agree(a, b, tolerance=1e-11):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(
    "case",
    ["full", "causal", "window", "blind", "bias", "sink", "mask", "decode", "widths", "longer queries"],
)
def test_definition(backend, case):
    n, m = {"decode": (3, 11), "longer queries": (9, 5)}.get(case, (7, 7))
    query, key, value = inputs(n=n, m=m, e=4 if case == "widths" else 6)
    pattern = {"full": None, "window": p.Window(2, 1), "blind": p.Window(1) & ~p.Window(1)}.get(
        case, p.Causal()
    )
    bias = torch.randn(4, 1, m, dtype=DTYPE) if case == "bias" else None
    sink = torch.randn(4, dtype=DTYPE) if case == "sink" else None
    key_mask = torch.rand(2, m, generator=torch.Generator().manual_seed(1)) > 0.4 if case == "mask" else None
    seen = p.Full().mask(n, m) if pattern is None else pattern.mask(n, m)

    def visible(b, h, i, j):
        return bool(seen[0, 0, i, j]) and (key_mask is None or bool(key_mask[b, j]))

    expected = loops(query, key, value, visible, 6**-0.5, bias if bias is None else bias[None], sink)
    got = heedful.attention(
        query,
        key,
        value,
        pattern=pattern,
        bias=bias,
        sink_logits=sink,
        key_mask=key_mask,
        return_lse=True,
        backend=backend,
    )
    agree(got, expected)


def test_reference_gradients_are_those_of_the_loops():
    leaves = inputs(b=1, hq=2, hkv=1, n=4, m=5)
    sink = torch.randn(2, dtype=DTYPE, requires_grad=True)
    seen = p.Causal().mask(4, 5)
    out, lse = loops(*leaves, lambda b, h, i, j: bool(seen[0, 0, i, j]), 6**-0.5, None, sink)
    got = heedful.attention(
        *leaves, pattern=p.Causal(), sink_logits=sink, return_lse=True, backend="reference"
    )
    g = torch.Generator().manual_seed(3)
    weights = (
        torch.randn(out.shape, generator=g, dtype=DTYPE),
        torch.randn(lse.shape, generator=g, dtype=DTYPE),
    )
    for (a, b), (c, d) in [(((out, lse)), got)]:
        left = torch.autograd.grad((a * weights[0]).sum() + (b * weights[1]).sum(), [*leaves, sink])
        right = torch.autograd.grad((c * weights[0]).sum() + (d * weights[1]).sum(), [*leaves, sink])
        agree(left, right)


LEAVES = st.one_of(
    st.just(p.Full()),
    st.just(p.Causal()),
    st.builds(p.Window, st.integers(0, 9), st.integers(0, 9), st.integers(1, 3)),
    st.builds(p.Sink, st.integers(0, 5)),
)
PATTERNS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.builds(lambda a, b: a & b, inner, inner), inner.map(lambda a: ~a)),
    max_leaves=4,
)


@settings(max_examples=40)
@given(
    pattern=PATTERNS,
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    widths=st.sampled_from([(4, 4), (4, 7), (8, 2)]),
    extras=st.sets(st.sampled_from(["bias", "sink", "mask"])),
    seed=st.integers(0, 99),
)
def test_tiled_equals_reference(pattern, n, m, heads, widths, extras, seed):
    leaves = inputs(2, *heads, n, m, *widths, seed=seed)
    g = torch.Generator().manual_seed(seed)
    kwargs = {"pattern": pattern}
    if "mask" in extras:
        kwargs["key_mask"] = torch.rand(2, m, generator=g) > 0.5
    if "sink" in extras:
        kwargs["sink_logits"] = torch.randn(heads[0], generator=g, dtype=DTYPE).requires_grad_()
        leaves.append(kwargs["sink_logits"])
    if "bias" in extras:
        kwargs["bias"] = torch.randn(heads[0], n, m, generator=g, dtype=DTYPE).requires_grad_()
        leaves.append(kwargs["bias"])
    agree(outcome(leaves, backend="tiled", **kwargs), outcome(leaves, backend="reference", **kwargs))


@settings(max_examples=25)
@given(pattern=PATTERNS, n=st.integers(1, 40), m=st.integers(1, 40), seed=st.integers(0, 99))
def test_sdpa_equals_reference(pattern, n, m, seed):
    leaves = inputs(1, 4, 2, n, m, 4, 6, seed=seed)
    outs = [heedful.attention(*leaves, pattern=pattern, backend=name) for name in ("sdpa", "reference")]
    grads = [torch.autograd.grad(out.sin().sum(), leaves) for out in outs]
    agree([outs[0], *grads[0]], [outs[1], *grads[1]])


@pytest.mark.parametrize("long", [False, True])
def test_rows_of_several_segments(monkeypatch, long):
    """Long rows are cut into full runs and masked pieces; the pieces must join exactly."""
    monkeypatch.setattr(tiled_plan, "_TOGETHER", 128)
    tiled_plan.pattern_plans.cache_clear()
    leaves = inputs(1, 2, 1, 700, 700 if not long else 900)
    for pattern in (p.Causal(), p.Window(150, 40) | p.Sink(3), ~p.Window(3)):
        agree(
            outcome(leaves, pattern=pattern, backend="tiled"),
            outcome(leaves, pattern=pattern, backend="reference"),
        )
    tiled_plan.pattern_plans.cache_clear()


def test_tiled_makes_each_mask_once(monkeypatch):
    """Tiles that hide alike share a mask, and no later pass makes it again."""
    pattern = LocalStride(2, block_size=64, local_blocks=2, stride=4)
    leaves = inputs(1, 2, 2, 2048, 2048, dtype=torch.float32)
    looks, look = [], tiled_plan.Plan._visible
    monkeypatch.setattr(tiled_plan.Plan, "_visible", lambda *a: looks.append(a) or look(*a))
    tiled_plan.pattern_plans.cache_clear()
    for _ in range(2):
        heedful.attention(*leaves, pattern=pattern, backend="tiled").sum().backward()
        plans = tiled_plan.pattern_plans(pattern, 2048, 2048, 0)
        assert sum(s.masked for each in plans for row in each.rows for s in row.segments) == len(looks)
    kept = {id(h.mask): h.mask.numel() for each in plans for h in each.masks._places.values()}
    assert len(kept) < len(looks) / 2
    tiled_plan.pattern_plans.cache_clear()


def scattered(n, m, leading, seed=0):
    """A random block table with full and partial tiles that differ by batch row and head."""
    g = torch.Generator().manual_seed(seed)
    some = torch.rand(*leading, -(-n // 4), -(-m // 3), generator=g) > 0.5
    every = torch.rand(some.shape, generator=g) > 0.5
    return BlockTable.from_tiles(some, every, (4, 3), (n, m), lambda b, h, q, k: (q + k) % 3 != 0)


def token_groups(n, m, leading, *, disjoint=True, bias=False, weight=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    b, h = leading

    def draw(size, limit):
        rows = [torch.randperm(limit, generator=g)[: 3 * size].view(3, size) for _ in range(b * h)]
        return torch.stack(rows).view(b, h, 3, size)

    keys = draw(5, m)
    keys[..., -1] = torch.where(torch.rand(b, h, 3, generator=g) > 0.5, -1, keys[..., -1])
    queries = draw(4, n) if disjoint else draw(4, n)[:, :, [0, 0, 1]]
    return TokenGroups(
        queries,
        keys,
        (n, m),
        lambda b, h, q, k: (q + 2 * k) % 4 != 0,
        torch.randn(b, h, 3, 5, generator=g, dtype=DTYPE).requires_grad_() if bias else None,
        torch.rand(b, h, 3, 4, generator=g, dtype=DTYPE).requires_grad_() if weight else None,
    )


SELECTIONS = {
    "shared table": lambda: scattered(19, 23, (1, 1)),
    "table a head": lambda: scattered(19, 23, (1, 4)),
    "table a row and head": lambda: scattered(19, 23, (2, 4)),
    "shared groups": lambda: token_groups(19, 23, (1, 1)),
    "groups a head": lambda: token_groups(19, 23, (2, 4)),
    "queries in several groups": lambda: token_groups(19, 23, (1, 1), disjoint=False),
    "several groups a head": lambda: token_groups(19, 23, (2, 4), disjoint=False, bias=True),
    "biased groups": lambda: token_groups(19, 23, (1, 1), bias=True),
    "weighted groups": lambda: token_groups(19, 23, (2, 4), disjoint=False, weight=True),
    "shared weighted groups": lambda: token_groups(19, 23, (1, 1), disjoint=False, weight=True),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("extra", ["plain", "mask", "bias", "sink"])
def test_selections_tiled_equals_reference(name, extra):
    selection = SELECTIONS[name]()
    leaves = inputs(2, 4, 2, 19, 23)
    kwargs = {"pattern": selection}
    weighted = isinstance(selection, TokenGroups) and selection.query_weight is not None
    if isinstance(selection, TokenGroups):
        leaves += [x for x in (selection.key_bias, selection.query_weight) if x is not None]
    if extra == "mask":
        kwargs["key_mask"] = torch.rand(2, 23, generator=torch.Generator().manual_seed(5)) > 0.4
    if extra == "bias":
        kwargs["bias"] = torch.randn(1, 4, 19, 23, dtype=DTYPE).requires_grad_()
        leaves.append(kwargs["bias"])
    if extra == "sink":
        if weighted:
            with pytest.raises(ValueError, match="query_weight"):
                heedful.attention(*leaves[:3], sink_logits=torch.zeros(4), **kwargs)
            return
        kwargs["sink_logits"] = torch.randn(4, dtype=DTYPE).requires_grad_()
        leaves.append(kwargs["sink_logits"])
    if weighted:
        outs = [heedful.attention(*leaves[:3], backend=b, **kwargs) for b in ("tiled", "reference")]
        grads = [torch.autograd.grad(o.sin().sum(), leaves) for o in outs]
        agree([outs[0], *grads[0]], [outs[1], *grads[1]])
    else:
        agree(outcome(leaves, backend="tiled", **kwargs), outcome(leaves, backend="reference", **kwargs))


def test_weighted_groups_are_a_sum_of_softmaxes():
    groups = token_groups(12, 15, (1, 1), disjoint=False, weight=True)
    query, key, value = inputs(1, 1, 1, 12, 15)
    out = heedful.attention(query, key, value, pattern=groups, backend="reference")
    expected = torch.zeros_like(out)
    pairs = groups.pair_mask()[0, 0]
    for g in range(3):
        for a, i in enumerate(groups.query_index[0, 0, g].tolist()):
            seen = [
                j
                for j, yes in zip(groups.key_index[0, 0, g].tolist(), pairs[g, a].tolist(), strict=True)
                if yes
            ]
            if seen:
                weights = torch.softmax(query[0, 0, i] @ key[0, 0, seen].T * 6**-0.5, -1)
                expected[0, 0, i] += groups.query_weight[0, 0, g, a] * (weights @ value[0, 0, seen])
    agree([out], [expected])


def test_merge_partials_joins_disjoint_keys():
    query, key, value = inputs(n=9, m=14)
    pattern = p.Window(3)  # some rows see nothing in one of the parts
    cut = [(0, 5), (5, 14)]
    parts = [
        heedful.attention(
            query,
            key[:, :, a:z],
            value[:, :, a:z],
            pattern=pattern,
            query_offset=5 - a,
            return_lse=True,
            backend=b,
        )
        for (a, z), b in zip(cut, ("tiled", "reference"), strict=True)
    ]
    leaves = [query, key, value]
    whole = heedful.attention(*leaves, pattern=pattern, return_lse=True, backend="reference")
    merged = heedful.merge_partials(parts)
    agree(merged, whole)
    grads = [torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves) for out, lse in (merged, whole)]
    agree(*grads)


def test_merge_partials_of_blind_rows():
    blind = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -math.inf)
    out, lse = heedful.merge_partials([blind, blind])
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_blind_rows_give_zeros_and_finite_gradients(backend):
    leaves = inputs()
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[0, :4] = True
    out = heedful.attention(*leaves, key_mask=mask, pattern=p.Causal(), backend=backend)
    assert (out[1] == 0).all()
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all()
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [None, p.Causal() & (p.Window(9) | p.Sink(2))])
def test_precision(dtype, pattern):
    """Errors are those of rounding inputs and outputs, not of accumulating in half precision."""
    leaves = inputs(n=150, m=150, d=16, e=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    want = outcome(exact, pattern=pattern, backend="reference")
    for backend in ("tiled", "reference"):
        got = outcome(leaves, pattern=pattern, backend=backend)
        for a, b in zip(got, want, strict=True):
            assert (a.double() - b).abs().max() <= tolerance * b.abs().clamp(max=1e3).max()


def test_alibi_in_half_precision_is_exact_over_long_distances():
    """Positions beyond 256 do not fit into bfloat16; the factors must not be rounded."""
    n = 1200
    query, key, value = inputs(1, 2, 2, n, n, 8, 8, dtype=torch.bfloat16)
    bias = alibi_bias(alibi_slopes(2), n)
    exact = heedful.attention(
        query.double(),
        key.double(),
        value.double(),
        bias=bias.dense().double(),
        pattern=p.Causal(),
        backend="reference",
    )
    for backend in ("tiled", "sdpa", "auto"):
        out = heedful.attention(query, key, value, bias=bias, pattern=p.Causal(), backend=backend)
        assert (out.double() - exact).abs().max() < 2e-2


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    n, m = shape
    out, lse = heedful.attention(*inputs(n=n, m=m), return_lse=True)
    assert out.shape == (2, 4, n, 6)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_empty_batch(name, backend):
    query, key, value = inputs(0, 4, 2, 19, 23)
    selection = SELECTIONS[name]()
    if "row" in name or "a head" in name or name == "weighted groups":
        return  # made for two batch rows or more
    assert heedful.attention(query, key, value, pattern=selection, backend=backend).shape == (0, 4, 19, 6)


def test_dropout_keeps_the_mean_and_repeats_in_backward():
    torch.manual_seed(0)
    query, key, _ = inputs(1, 1, 1, 40, 40)
    value = torch.ones(1, 1, 40, 6, dtype=DTYPE, requires_grad=True)
    outs = torch.stack(
        [heedful.attention(query, key, value, dropout_p=0.3, backend="tiled") for _ in range(300)]
    )
    assert abs(outs.mean().item() - 1) < 0.02
    assert outs.std() > 0.01
    # The map is linear in value, so its gradient must reproduce the very weights of the forward pass.
    out = heedful.attention(query, key, value, dropout_p=0.3, backend="tiled")
    (grad,) = torch.autograd.grad(out[..., 0].sum(), value)
    torch.testing.assert_close((grad * value).sum(), out[..., 0].sum())


def test_causal_never_sees_the_future():
    leaves = inputs(n=300, m=300)
    for backend in ("tiled", "reference", "sdpa"):
        out = heedful.attention(*leaves, pattern=p.Causal() & p.Window(40), backend=backend)
        grads = torch.autograd.grad(out[:, :, :100].sum(), leaves[1:])
        assert all((g[:, :, 100:] == 0).all() and (g[:, :, :100] != 0).any() for g in grads)


def test_double_backward_says_that_it_does_not():
    leaves = inputs()
    out = heedful.attention(*leaves, backend="tiled")
    (grad,) = torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda *x: heedful.attention(*x, backend="reference"), inputs(1, 1, 1, 3, 3, 2, 2)
    )


@pytest.mark.compiled
def test_compile_keeps_values_and_gradients():
    leaves = inputs(n=20, m=20)
    run = torch.compile(
        lambda q, k, v: heedful.attention(q, k, v, pattern=p.Causal() & p.Window(3), backend="tiled"),
        backend="aot_eager",
    )
    for a, b in zip(
        torch.autograd.grad(run(*leaves).sin().sum(), leaves),
        torch.autograd.grad(heedful.attention(*leaves, pattern=p.Causal() & p.Window(3)).sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.compiled
def test_flex_equals_reference_without_gradients():
    """FlexAttention does not train on a CPU; its eager form is compared, which needs no C++ compiler."""
    query, key, value = (x.detach().float() for x in inputs(n=200, m=260, d=16, e=16))
    pattern = p.Causal() & (p.Window(30) | p.Sink(3))
    mask = torch.rand(2, 260, generator=torch.Generator().manual_seed(0)) > 0.2
    for extra in (
        {},
        {"key_mask": mask},
        {"pattern": p.PerHead([pattern, p.Window(3), p.Full(), p.Causal()])},
    ):
        kwargs = {"pattern": pattern, **extra}
        want = heedful.attention(query, key, value, backend="reference", **kwargs)
        with torch.no_grad(), uncompiled_flex():
            got = heedful.attention(query, key, value, backend="flex", **kwargs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class uncompiled_flex:  # noqa: N801
    """FlexAttention's eager form computes the same and needs no C++ compiler."""

    def __enter__(self):
        from torch.nn.attention.flex_attention import flex_attention

        self.saved = BACKENDS["flex"]._compiled
        BACKENDS["flex"]._compiled = lambda: flex_attention
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        BACKENDS["flex"]._compiled = self.saved
        self.warnings.__exit__(*error)


@pytest.mark.door
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            dict.fromkeys(("key", "value"), torch.zeros(2, 3, 13, 6, dtype=DTYPE)),
            "key has 3 heads, must divide query's 4",
        ),
        ({"key": torch.zeros(2, 2, 13, 5, dtype=DTYPE)}, "key has shape"),
        ({"value": torch.zeros(2, 2, 12, 6, dtype=DTYPE)}, "value has shape"),
        ({"query": torch.zeros(4, 13, 6, dtype=DTYPE)}, "query has shape"),
        ({"key": torch.zeros(2, 2, 13, 6)}, "key has dtype"),
        ({"key_mask": torch.ones(2, 13)}, "key_mask has shape"),
        ({"sink_logits": torch.zeros(3)}, "sink_logits has shape"),
        ({"bias": torch.zeros(3, 13, 13)}, "bias has shape"),
        ({"bias": alibi_bias(alibi_slopes(4), 12)}, "bias has factors for 12 queries"),
        ({"dropout_p": 1.5}, "dropout_p is 1.5"),
        ({"backend": "fast"}, "backend is 'fast', must be one of"),
        ({"pattern": scattered(12, 13, (1, 1))}, "pattern is for"),
        ({"pattern": scattered(13, 13, (3, 1))}, "pattern is for 3 batch rows"),
        ({"backend": "sdpa", "return_lse": True}, "backend 'sdpa' gives no log-sum-exp"),
        ({"backend": "flex"}, "backend 'flex' cannot train on a CPU"),
    ],
)
def test_errors_at_the_door(change, words):
    query, key, value = inputs()
    call = {"query": query, "key": key, "value": value, **change}
    with pytest.raises(ValueError, match=words):
        heedful.attention(**call)


def test_large_dense_computations_warn_or_refuse():
    query = torch.zeros(1, 1, 1 << 14, 1)
    with pytest.warns(UserWarning, match="tiled"):
        heedful.attention(query[:, :, :8200], query[:, :, :8200], query[:, :, :8200], backend="reference")
    big = torch.zeros(1, 5, 1 << 14, 1)
    with pytest.raises(ValueError, match="2\\^30"):
        heedful.attention(big, big, big, backend="reference")


def test_a_trained_bias_may_hide_whole_rows():
    """Zeros for them, and no gradient through them: not NaN."""
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=DTYPE, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 5, 5, dtype=DTYPE)
    bias[:, 1], bias[0, 2, :3] = -torch.inf, -torch.inf
    bias.requires_grad_()
    out = {}
    for backend in ("sdpa", "tiled", "reference"):
        y = heedful.attention(q, k, v, bias=bias, backend=backend)
        grads = torch.autograd.grad((y * torch.arange(4)).sum(), (q, k, v, bias))
        out[backend] = (y, *(torch.where(bias == -torch.inf, 0.0, g) if g is grads[3] else g for g in grads))
    assert (out["reference"][0][:, :, 1] == 0).all()
    assert all(x.isfinite().all() for x in out["reference"])
    torch.testing.assert_close(out["sdpa"], out["reference"])
    torch.testing.assert_close(out["tiled"], out["reference"])
    with torch.no_grad():
        torch.testing.assert_close(heedful.attention(q, k, v, bias=bias, backend="sdpa"), out["sdpa"][0])
