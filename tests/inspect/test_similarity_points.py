"""Similarity and points against transcriptions of their steps, and facts that pin them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from heedful.inspect import discrete_to_continuous, seg_token_similarity_map, similarity_to_points


def drawn(side, seed=0):
    return torch.randn(side * side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bilinear(x, size):
    return F.interpolate(x[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def points_by_steps(similarity, size, down_sample, count, t_pos, t_neg):
    """Cell by cell, with a dictionary of the cells within reach."""
    side, (height, width) = math.isqrt(len(similarity)), size
    g = side // down_sample
    coarse = bilinear(similarity.view(side, side), (g, g))
    coarse = (coarse - coarse.min()) / (coarse.max() - coarse.min())
    top, left = (max(0, (n * g // min(size) - g) // 2) for n in size)
    h, w = g + 2 * top, g + 2 * left
    value = {(top + i) * w + left + j: coarse[i, j].item() for i in range(g) for j in range(g)}
    positive = sorted((k for k, x in value.items() if x >= t_pos), key=lambda k: (-value[k], k))
    negative = sorted((k for k, x in value.items() if x <= t_neg), key=lambda k: (value[k], k))
    neutral = sorted(value.keys() - set(positive) - set(negative))
    labels = [1] * len(positive) + [0] * len(negative) + [-1] * len(neutral)
    points = [
        [int(min((k % w + 0.5) * width / w, width - 1)), int(min((k // w + 0.5) * height / h, height - 1))]
        for k in positive + negative + neutral
    ]
    return points[:count], labels[:count]


@pytest.mark.parametrize("size", [(60, 90), (48, 48), (75, 40), (31, 97), (5, 7)])
@pytest.mark.parametrize("options", [(2, 30, 0.8, 0.2), (1, 60, 0.6, 0.2), (5, 500, 0.7, 0.1)])
def test_points_by_steps(size, options):
    similarity = drawn(12)
    down_sample, count, t_pos, t_neg = options
    points, labels = similarity_to_points(
        similarity, size, down_sample=down_sample, num_points=count, t_pos=t_pos, t_neg=t_neg
    )
    wanted = points_by_steps(similarity, size, *options)
    assert (points.tolist(), labels.tolist()) == wanted
    assert len(points) == min(count, (12 // down_sample) ** 2)
    order = [x for x, _ in itertools.groupby(labels.tolist())]
    assert order == [1, 0, -1][: len(order)]


def moved_by_steps(similarity, points, size, resolution):
    """Weights over all pixels, as the paper has them."""
    side, (height, width) = math.isqrt(len(similarity)), size
    z = similarity.view(side, side)
    z = bilinear((z - z.min()) / (z.max() - z.min()), (resolution, resolution))
    m = min(size)
    right, down = ((int(n * resolution / m) - resolution) // 2 for n in (width, height))
    z = bilinear(F.pad(z, (right, right, down, down)), size)
    share = z.flatten().softmax(0).view(size)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    moved = []
    for x, y in points.tolist():
        w = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2).double()) * share
        moved.append(torch.stack([(w * columns).sum(), (w * rows).sum()]) / w.sum())
    return torch.stack(moved)


@pytest.mark.parametrize("size", [(20, 33), (24, 24), (37, 19)])
def test_moved_points_by_steps(size):
    similarity = drawn(6).requires_grad_()
    corners = torch.tensor([[0, 0], [size[1] - 1, size[0] - 1], [size[1] - 1, 0]])
    points = torch.cat([similarity_to_points(similarity, size).points, corners])
    moved = discrete_to_continuous(similarity, points, size, resolution=42)
    wanted = moved_by_steps(similarity, points, size, 42)
    torch.testing.assert_close(moved, wanted)
    assert 0.01 < (moved - points).abs().max() < 1
    weight = torch.randn(moved.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad((moved * weight).sum(), similarity)
    (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), similarity)
    torch.testing.assert_close(grad, wanted_grad)
    assert grad.abs().max() > 1e-3


def test_similarity():
    torch.manual_seed(0)
    image, seg = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    found = seg_token_similarity_map(image, seg)
    for b in range(2):
        p = [math.exp(2 * sum(image[b, 0] * t)) for t in seg]
        for s in range(3):
            w = p[s] / (sum(p) / 3)
            torch.testing.assert_close(found[b, :, s], w * (image[b] * seg[s]).sum(-1))
    torch.testing.assert_close(seg_token_similarity_map(image, seg[:1])[..., 0], image @ seg[0])


def test_a_flat_map():
    points, labels = similarity_to_points(torch.full((64,), 3.0), (40, 60))
    assert len(points) == 16 and (labels == -1).all()
    flat = torch.full((64,), 3.0, requires_grad=True)
    inner = torch.tensor([[30, 20], [17, 9]])
    moved = discrete_to_continuous(flat, inner, (40, 60))
    torch.testing.assert_close(moved, inner.float(), rtol=0, atol=1e-5)  # pixels of float32
    moved.sum().backward()
    assert flat.grad.isfinite().all()


def test_square_has_no_border():
    """Every cell of a square picture is within reach, also where 47 x (12 / 47) rounds below 12."""
    points, _ = similarity_to_points(drawn(12), (47, 47), down_sample=1, num_points=144)
    middles = {int((i + 0.5) * 47 / 12) for i in range(12)}
    assert {(x, y) for x, y in points.tolist()} == {(x, y) for x in middles for y in middles}
    points, _ = similarity_to_points(drawn(12), (47, 94), down_sample=1, num_points=144)
    assert len({x for x, _ in points.tolist()}) == len({y for _, y in points.tolist()}) == 12
    assert points[:, 0].min() > 20 and points[:, 0].max() < 74


def test_the_brightest_cell_comes_first():
    similarity = torch.zeros(16, 16)
    similarity[4:6, 10:12] = 1.0
    similarity[8:10, 2:4] = 1.0  # equal: the first in reading order stays first
    points, labels = similarity_to_points(similarity.flatten(), (160, 160), num_points=3)
    assert points.tolist() == [[110, 50], [30, 90], [10, 10]] and labels.tolist() == [1, 1, 0]
    half, _ = similarity_to_points(similarity.flatten().half(), (160, 160), num_points=3)
    assert torch.equal(half, points)


@pytest.mark.door
def test_doors():
    x = torch.randn(16)
    with pytest.raises(ValueError, match=r"similarity has shape \(15,\), must be \(side\^2,\)"):
        similarity_to_points(x[:15], (4, 4))
    with pytest.raises(ValueError, match="not finite"):
        similarity_to_points(x.index_fill(0, torch.tensor([3]), float("nan")), (4, 4))
    with pytest.raises(ValueError, match=r"t_neg is 0\.9 and t_pos is 0\.8, must be"):
        similarity_to_points(x, (4, 4), t_neg=0.9)
    with pytest.raises(ValueError, match="down_sample is 5, must be at most 4"):
        similarity_to_points(x, (4, 4), down_sample=5)
    with pytest.raises(ValueError, match="height of size is 0"):
        similarity_to_points(x, (0, 4))
    with pytest.raises(ValueError, match="points must lie within the picture of 6 x 4 pixels"):
        discrete_to_continuous(x, torch.tensor([[6, 3]]), (4, 6))
