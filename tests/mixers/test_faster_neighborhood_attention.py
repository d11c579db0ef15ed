from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import heedful
from heedful.mixers.grid.faster_neighborhood_attention import NeighborhoodAttention


def window_of(length: int, w: int, s: int, d: int, causal: bool, q: int) -> list[int]:
    """Keys of the query at q on one axis, from the list of tokens of its residue."""
    group = [x for x in range(length) if x % d == q % d]
    a, n = group.index(q), len(group)
    if causal:
        leader = min((a // s) * s + s - 1, n - 1)
        return [group[b] for b in range(a + 1) if leader - b < w]
    start = max(0, min(min((a // s) * s + s // 2, n - 1) - w // 2, n - w))
    return group[start : start + w]


def transcription(
    m: NeighborhoodAttention,
    x: Tensor,
    rules: list[tuple[int, int, int, bool]],
    context: Tensor | None = None,
) -> Tensor:
    """Query by query, head by head; `rules` is (window, stride, dilation, causal) of each axis."""
    size, width = x.shape[2:], m.dim // m.heads
    y = torch.zeros_like(x)
    for b in range(len(x)):
        for place in itertools.product(*(range(s) for s in size)):
            near = itertools.product(
                *(window_of(s, *r, i) for s, r, i in zip(size, rules, place, strict=True))
            )
            seen = [x[b][(slice(None), *key)] for key in near]
            seen += [] if context is None else list(context[b])
            heads = []
            for h in range(m.heads):

                def part(token: Tensor, which: int, h: int = h) -> Tensor:
                    rows = slice(which * m.dim + h * width, which * m.dim + (h + 1) * width)
                    bias = 0 if m.qkv.bias is None else m.qkv.bias[rows]
                    return m.qkv.weight[rows] @ token + bias

                q = part(x[b][(slice(None), *place)], 0)
                weights = torch.stack([(q @ part(token, 1) / width**0.5).exp() for token in seen])
                values = torch.stack([part(token, 2) for token in seen])
                heads.append((weights / weights.sum()) @ values)
            y[b][(slice(None), *place)] = m.proj.weight @ torch.cat(heads) + m.proj.bias
    return y


CASES = [
    ((9,), {"window": 4}, [(4, 1, 1, False)]),
    ((11,), {"window": 3, "dilation": 3, "qkv_bias": False}, [(3, 1, 3, False)]),
    ((10,), {"window": 5, "stride": 3, "causal": True}, [(5, 3, 1, True)]),
    ((5, 6), {"window": 3}, [(3, 1, 1, False)] * 2),
    (
        (5, 6),
        {"window": (4, 3), "stride": (2, 3), "dilation": (1, 2), "causal": (True, False)},
        [(4, 2, 1, True), (3, 3, 2, False)],
    ),
    (
        (3, 4, 3),
        {"window": (2, 3, 2), "causal": (True, False, False)},
        [(2, 1, 1, True), (3, 1, 1, False), (2, 1, 1, False)],
    ),
    # Where window * dilation exceeds an axis, the largest window that fits.
    ((4, 5), {"window": 7, "stride": 5}, [(4, 4, 1, False), (5, 5, 1, False)]),
    ((2, 9), {"window": 3, "dilation": 4}, [(1, 1, 2, False), (2, 1, 4, False)]),
]


def mixer(**kwargs) -> NeighborhoodAttention:
    torch.manual_seed(0)
    return NeighborhoodAttention(8, heads=2, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize(("size", "kwargs", "rules"), CASES)
@pytest.mark.parametrize("extra", [0, 3])
def test_equals_transcription(size, kwargs, rules, extra: int) -> None:
    m = mixer(**kwargs)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, extra, 8, dtype=torch.float64, requires_grad=True) if extra else None
    given = [x] if context is None else [x, context]
    wanted = [*given, *m.parameters()]
    y, expected = m(*given[:1], context=context), transcription(m, x, rules, context)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum(), wanted)
    right = torch.autograd.grad((expected * weight).sum(), wanted)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_ends_of_the_spectrum() -> None:
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    m = mixer(window=1)
    value = torch.einsum("oc,bchw->bohw", m.qkv.weight[16:], x) + m.qkv.bias[16:, None, None]
    expected = torch.einsum("oc,bchw->bohw", m.proj.weight, value) + m.proj.bias[:, None, None]
    torch.testing.assert_close(m(x), expected)
    # A window over the whole map forgets where tokens stand.
    m = mixer(window=(4, 5))
    torch.testing.assert_close(m(x.flip(2, 3)), m(x).flip(2, 3))


def test_interior_moves_with_the_map() -> None:
    m = mixer(window=3)
    x = torch.randn(1, 8, 9, 10, dtype=torch.float64)
    y, moved = m(x), m(x.roll((2, 1), (2, 3)))
    torch.testing.assert_close(moved[:, :, 3:8, 2:9], y[:, :, 1:6, 1:8])


def test_dilation_is_one_map_a_residue() -> None:
    m, plain = mixer(window=3, dilation=2), mixer(window=3)
    x = torch.randn(1, 8, 7, 9, dtype=torch.float64)
    for i, j in itertools.product(range(2), range(2)):
        torch.testing.assert_close(m(x)[:, :, i::2, j::2], plain(x[:, :, i::2, j::2]))


def test_parameters() -> None:
    count = sum(p.numel() for p in NeighborhoodAttention(64).parameters())
    assert count == 3 * 64 * 64 + 3 * 64 + 64 * 64 + 64
    names = [name for name, _ in NeighborhoodAttention(64, qkv_bias=False).named_parameters()]
    assert names == ["qkv.weight", "proj.weight", "proj.bias"]


def test_names_and_declarations() -> None:
    m = heedful.create("neighborhood-attention", 16, heads=4, window=3, causal=(True, True))
    assert isinstance(m, NeighborhoodAttention)
    assert m.causal
    assert not NeighborhoodAttention(16, causal=(True, False)).causal


def test_dropout_falls_on_the_output() -> None:
    m = mixer(window=3, dropout=0.5)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    y = m(x)
    kept = y != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(y[kept], 2 * m.eval()(x)[kept])


@pytest.mark.door
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"heads": 3}, "heads is 3, must divide dim, which is 8"),
        ({"window": 3, "stride": 4}, "stride is 4, must be at most window, which is 3"),
        ({"window": (3, 5), "stride": (3, 6)}, "stride is 6"),
        ({"window": (3, 5), "dilation": (1, 1, 1)}, "dilation is .1, 1, 1., must be one value or 2"),
        ({"window": 0}, "window is 0"),
        ({"dilation": 0}, "dilation is 0"),
    ],
)
def test_errors_at_construction(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(8, **{"heads": 2, **kwargs})


@pytest.mark.door
def test_errors_of_inputs() -> None:
    m = NeighborhoodAttention(8, heads=2, window=(3, 3))
    with pytest.raises(ValueError, match=r"must be .batch, 8, height, width"):
        m(torch.zeros(1, 8, 5))
    with pytest.raises(ValueError, match=r"must be .1, tokens, 8"):
        m(torch.zeros(1, 8, 5, 5), context=torch.zeros(2, 3, 8))
