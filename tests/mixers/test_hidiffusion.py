from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.mixers.test_radial_attention import dense
from tests.test_patterns_video import quadrant
from torch import Tensor

from heedful.mixers.grid.hidiffusion import (
    ModifiedShiftedWindowAttention,
    draw_shift,
    feature_size,
    shift_at,
)
from heedful.patterns.quadrant_window import QuadrantWindow


def mixer(**options) -> ModifiedShiftedWindowAttention:
    torch.manual_seed(0)
    return ModifiedShiftedWindowAttention(12, heads=2, qkv_bias=True, dtype=torch.float64, **options)


def expected_of(m: ModifiedShiftedWindowAttention, x: Tensor, shift: int) -> Tensor:
    """Dense attention with a mask, on the map resized to even sides, and back."""
    size = x.shape[2:]
    even = [length + length % 2 for length in size]
    if even != list(size):
        x = F.interpolate(x, even, mode="bicubic", align_corners=False)
    y = dense(m, x, quadrant(QuadrantWindow(tuple(even), shift)), 6**-0.5)
    return y if even == list(size) else F.interpolate(y, size, mode="bicubic", align_corners=False)


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(8, 12), (16, 10), (6, 16), (7, 9), (1, 1)])
def test_equals_dense_attention_with_the_mask_of_the_windows(size: tuple, shift: int) -> None:
    m = mixer()
    x = torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True)
    y, expected = m(x, shift=shift), expected_of(m, x, shift)
    torch.testing.assert_close(y, expected)
    wrt, up = (x, *m.parameters()), torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wrt, up), torch.autograd.grad(expected, wrt, up))


def test_cutting_into_windows_is_undone() -> None:
    m = mixer()
    m.mix = lambda x, size: x
    x = torch.randn(2, 12, 10, 16, dtype=torch.float64)
    for shift in range(4):
        assert torch.equal(m(x, shift=shift), x)


def test_shifts_are_quarters_of_a_window_rounded_down() -> None:
    assert [QuadrantWindow((22, 30), s).moved for s in range(4)] == [(0, 0), (2, 3), (4, 6), (6, 9)]


def test_the_shift_is_drawn_anew_for_every_call() -> None:
    assert [shift_at(u) for u in (0.0, 0.25, 0.26, 0.5, 0.51, 0.75, 0.76, 0.999)] == [0, 0, 1, 1, 2, 2, 3, 3]
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_shift(generator) for _ in range(400)]
    assert all(70 < drawn.count(shift) < 130 for shift in range(4))
    assert drawn == [draw_shift(generator.manual_seed(0)), *drawn[1:]]
    m = mixer()
    x = torch.randn(1, 12, 8, 8, dtype=torch.float64)
    forms = [m(x, shift=shift) for shift in range(4)]
    torch.manual_seed(1)
    u = [float(torch.rand(1)) for _ in range(6)]
    torch.manual_seed(1)
    for each in u:
        assert torch.equal(m(x), forms[shift_at(each)])


def test_size_of_a_feature_map() -> None:
    assert feature_size(384, (32, 48)) == (16, 24)
    assert feature_size(63, (14, 18)) == (7, 9)
    assert feature_size(48, (15, 12)) == (8, 6)


def test_parameter_count() -> None:
    m = ModifiedShiftedWindowAttention(24, heads=4)
    assert sum(p.numel() for p in m.parameters()) == 4 * 24 * 24 + 24


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        ModifiedShiftedWindowAttention(16, heads=5)
    with pytest.raises(ValueError, match="shift is 4, must be one of"):
        ModifiedShiftedWindowAttention(16)(torch.zeros(1, 16, 4, 4), shift=4)
    with pytest.raises(ValueError, match="tokens is 50, must be"):
        feature_size(50, (14, 18))
