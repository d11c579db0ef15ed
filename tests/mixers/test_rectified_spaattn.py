from __future__ import annotations

import pytest
import torch
from tests.mixers.test_radial_attention import dense
from tests.test_rectified_blocks import literal
from torch import Tensor

from heedful.mixers.grid.rectified_spaattn import RectifiedSparseAttention
from heedful.routing.gilbert import block_neighbors, gilbert_order


def expected_of(m: RectifiedSparseAttention, x: Tensor, top_k: int, first_blocks: int) -> Tensor:
    """Tokens along the curve, the literal rule for each head, and back."""
    size = tuple(x.shape[2:])
    order = gilbert_order(size)
    rows = []
    for one in x:
        tokens = one.flatten(1).T[order]
        q, k, v = (
            (tokens @ m.qkv.weight.T + m.qkv.bias)
            .unflatten(-1, (3, m.heads, -1))
            .permute(1, 2, 0, 3)
            .unbind(0)
        )
        heads = [
            literal(
                *part,
                block_size=m.block_size,
                top_k=top_k,
                p_remain=m.p_remain,
                neighbors=block_neighbors(size, m.block_size),
                first_blocks=first_blocks,
            )[0]
            for part in zip(q, k, v, strict=True)
        ]
        y = torch.cat(heads, -1) @ m.proj.weight.T + m.proj.bias
        rows.append(y[order.argsort()].T.view_as(one))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("size", "block", "drop_rate", "top_k", "first_blocks"),
    [((3, 4, 6), 4, 0.75, 4, 6), ((2, 5, 9), 6, 0.8, 2, 7), ((8, 3, 3), 5, 0.9, 1, 1)],
)
def test_equals_transcription_with_gradients(
    size: tuple, block: int, drop_rate: float, top_k: int, first_blocks: int
) -> None:
    torch.manual_seed(0)
    m = RectifiedSparseAttention(
        8, heads=2, block_size=block, drop_rate=drop_rate, p_remain=0.2, dtype=torch.float64
    )
    # int((1 - 0.8) * 15) is 2, in floating point.
    # A video that varies slowly, so that blocks are alike inside and can be trusted.
    x = torch.randn(1, 8, *size, dtype=torch.float64).cumsum(2).cumsum(3).cumsum(4).requires_grad_()
    y, expected = m(x), expected_of(m, x, top_k, first_blocks)
    torch.testing.assert_close(y, expected)
    wrt, up = (x, *m.parameters()), torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wrt, up), torch.autograd.grad(expected, wrt, up))


def test_nothing_dropped_is_full_attention() -> None:
    m = RectifiedSparseAttention(8, heads=2, block_size=4, drop_rate=0.0, dtype=torch.float64)
    x = torch.randn(1, 8, 2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(m(x), dense(m, x, torch.ones(40, 40, dtype=torch.bool), 0.5))


def test_one_block_is_full_attention() -> None:
    m = RectifiedSparseAttention(8, heads=2, dtype=torch.float64)
    x = torch.randn(1, 8, 2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(m(x), dense(m, x, torch.ones(30, 30, dtype=torch.bool), 0.5))


def test_parameter_count() -> None:
    assert sum(p.numel() for p in RectifiedSparseAttention(24, heads=4).parameters()) == 4 * 24 * 25


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        RectifiedSparseAttention(16, heads=5)
    with pytest.raises(ValueError, match=r"drop_rate is 1\.0, must lie in"):
        RectifiedSparseAttention(16, drop_rate=1.0)
    with pytest.raises(ValueError, match="block_size is 0"):
        RectifiedSparseAttention(16, block_size=0)
