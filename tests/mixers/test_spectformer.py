from __future__ import annotations

import cmath

import pytest
import torch
from tests.literal import assert_same_with_gradients
from torch import Tensor
from torch.testing import assert_close

from heedful.mixers.grid.spectformer import SpectralGating
from heedful.models.spectformer_blocks import ClassBlock, HierarchicalBlock, MapAttention, SpectralBlock


def build(size: tuple[int, int], dim: int = 2) -> SpectralGating:
    torch.manual_seed(0)
    m = SpectralGating(dim, size=size, dtype=torch.float64)
    with torch.no_grad():
        m.complex_weight.normal_()
    return m


def literal(x: Tensor, m: SpectralGating) -> Tensor:
    """One map (c, height, width): the transform and back, frequency by frequency, as real sums."""
    _, height, width = x.shape
    cells = [(i, j) for i in range(height) for j in range(width)]
    weight = m.complex_weight
    y = [torch.zeros(len(x), dtype=torch.float64) for _ in cells]
    for a in range(height):
        for b in range(width // 2 + 1):
            waves = [cmath.exp(-2j * cmath.pi * (a * i / height + b * j / width)) for i, j in cells]
            real = sum(x[:, i, j] * wave.real for (i, j), wave in zip(cells, waves, strict=True))
            imag = sum(x[:, i, j] * wave.imag for (i, j), wave in zip(cells, waves, strict=True))
            w, v = weight[a, b, :, 0], weight[a, b, :, 1]
            real, imag = real * w - imag * v, real * v + imag * w
            # Columns of frequencies that are not kept are the conjugates of those that are.
            twice = 1 if b == 0 or 2 * b == width else 2
            for cell, wave in enumerate(waves):
                y[cell] = y[cell] + twice * (real * wave.real + imag * wave.imag) / (height * width)
    return torch.stack(y, -1).view_as(x)


@pytest.mark.parametrize("size", [(3, 4), (4, 5), (1, 6)])
def test_equals_the_sums_over_frequencies(size):
    m = build(size)
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x), torch.stack([literal(row, m) for row in x]), [x, *m.parameters()])


def test_a_weight_of_one_is_the_identity():
    m = build((5, 6))
    with torch.no_grad():
        m.complex_weight.copy_(torch.tensor([1.0, 0.0]))
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    assert_close(m(x), x)


def test_equals_circular_convolution_and_moves_with_the_map():
    m, x = build((4, 5)), torch.randn(1, 2, 4, 5, dtype=torch.float64)
    kernel = torch.fft.irfft2(m.filter((4, 5), torch.float64), s=(4, 5))
    y = torch.zeros_like(x)
    for i in range(4):
        for j in range(5):
            y = y + kernel[:, i, j, None, None] * x.roll((i, j), (2, 3))
    assert_close(m(x), y)
    assert_close(m(x.roll((1, 2), (2, 3))), m(x).roll((1, 2), (2, 3)))


def test_on_another_map_constant_parts_keep_their_weight():
    m = build((4, 5))
    for size in ((7, 9), (3, 3)):
        y = m(torch.ones(1, 2, *size, dtype=torch.float64))
        assert_close(y, m.complex_weight[0, 0, :, 0].view(1, 2, 1, 1).expand(1, 2, *size))


def test_spectral_block_has_one_residual():
    torch.manual_seed(0)
    block = SpectralBlock(6, size=(3, 4), hidden=8)
    x = torch.randn(2, 6, 3, 4)
    inside = block.filter(block.norm1(x)).movedim(1, -1)
    hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(inside)))
    assert_close(block(x), x + block.mlp.fc2(hidden).movedim(-1, 1))


def test_class_block_changes_the_first_token_alone():
    torch.manual_seed(0)
    block, x = ClassBlock(6, heads=2, hidden=8), torch.randn(2, 5, 6)
    y = block(x)
    assert torch.equal(y[:, 1:], x[:, 1:])
    whole = block.attention(block.norm1(x))[:, :1]
    first = x[:, :1] + whole
    assert_close(y[:, :1], first + block.mlp(block.norm2(first)))


@pytest.mark.parametrize(
    ("width", "depth", "published"),
    [(256, 12, 9_158_376), (384, 12, 20_028_520), (384, 19, 32_449_768), (512, 19, 57_159_656)],
)
def test_parameters_of_the_columnar_networks(width, depth, published):
    with torch.device("meta"):
        spectral = SpectralBlock(width, size=(14, 14), hidden=4 * width)
    attention = 4 * width * width + 4 * width + 4 * width + (width + 1) * 4 * width + (4 * width + 1) * width
    total = 4 * sum(p.numel() for p in spectral.parameters()) + (depth - 4) * attention
    total += (768 + 1) * width + 196 * width + 2 * width + (width + 1) * 1000  # patches, positions, head
    assert total == published


def test_blocks_train():
    for block in (
        HierarchicalBlock(6, MapAttention(6, heads=2), hidden=8),
        HierarchicalBlock(6, SpectralGating(6, size=(3, 4)), hidden=8),
    ):
        block(torch.randn(2, 6, 3, 4)).square().sum().backward()
        assert all(p.grad.any() for n, p in block.named_parameters() if not n.endswith("key.bias"))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"size\[0\] is 0"):
        SpectralGating(8, size=(0, 3))
