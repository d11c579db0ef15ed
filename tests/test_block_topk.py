from __future__ import annotations

import itertools

import pytest
import torch

import heedful
from heedful.routing.block_topk import block_groups, block_means, block_topk, grid_blocks, region_topk


@pytest.mark.parametrize(
    ("size", "block"),
    [
        ((7,), (3,)),
        ((6,), (2,)),
        ((5, 4), (2, 3)),
        ((4, 6), (2, 3)),
        ((3, 4, 5), (2, 4, 2)),
        ((2, 2), (5, 5)),
    ],
)
def test_blocks_of_a_grid(size: tuple[int, ...], block: tuple[int, ...]) -> None:
    blocks = grid_blocks(size, block)
    literal = []
    for corner in itertools.product(*(range(0, s, z) for s, z in zip(size, block, strict=True))):
        tokens = []
        for step in itertools.product(*map(range, block)):
            at = [c + t for c, t in zip(corner, step, strict=True)]
            number = 0
            for a, s in zip(at, size, strict=True):
                number = number * s + a
            tokens.append(number if all(a < s for a, s in zip(at, size, strict=True)) else -1)
        literal.append(tokens)
    assert blocks.tolist() == literal


def test_means_leave_out_what_is_not_there() -> None:
    x = torch.randn(2, 3, 20, 4, dtype=torch.float64)
    blocks = grid_blocks((5, 4), (2, 3))
    means = block_means(x, blocks)
    for g, row in enumerate(blocks.tolist()):
        torch.testing.assert_close(means[:, :, g], x[:, :, [t for t in row if t >= 0]].mean(2))


def test_picks_the_largest_inner_products_best_first() -> None:
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4)
    picked = block_topk(q, k, 3)
    for b, h, i in itertools.product(range(2), range(3), range(5)):
        scores = [float(q[b, h, i] @ k[b, h, j]) for j in range(6)]
        assert picked[b, h, i].tolist() == sorted(range(6), key=lambda j: -scores[j])[:3]


def test_of_equal_scores_the_first_block_wins() -> None:
    k = torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0])[None, None, :, None]
    assert block_topk(torch.ones(1, 1, 1, 1), k, 4).flatten().tolist() == [1, 3, 0, 2]


def test_selection_passes_no_gradient() -> None:
    q, k = torch.randn(1, 2, 12, 4, requires_grad=True), torch.randn(1, 2, 12, 4, requires_grad=True)
    groups = region_topk(q, k, size=(12,), block_size=(3,), k=2)
    assert not groups.key_index.requires_grad
    v = torch.randn(1, 2, 12, 4)
    ours = torch.autograd.grad(heedful.attention(q, k, v, pattern=groups).sum(), (q, k))
    logits = (q @ k.transpose(-1, -2) * 0.5).masked_fill(~groups.dense(1, 2), -torch.inf)
    fixed = torch.autograd.grad((logits.softmax(-1) @ v).sum(), (q, k))
    torch.testing.assert_close(ours, fixed)


@pytest.mark.parametrize(("size", "block"), [((11,), (4,)), ((5, 6), (2, 3)), ((2, 3, 4), (2, 2, 2))])
def test_selection_serves_attention(size: tuple[int, ...], block: tuple[int, ...]) -> None:
    n = torch.Size(size).numel()
    q, k, v = torch.randn(3, 2, 4, n, 8, dtype=torch.float64)
    groups = region_topk(q, k, size=size, block_size=block, k=2)
    blocks = grid_blocks(size, block)
    where = torch.zeros(n, dtype=torch.long)
    for g, row in enumerate(blocks):
        where[row[row >= 0]] = g
    picked = block_topk(block_means(q, blocks), block_means(k, blocks), 2)
    seen = torch.zeros(2, 4, n, n, dtype=torch.bool)
    for b, h, i, j in itertools.product(range(2), range(4), range(n), range(n)):
        seen[b, h, i, j] = int(where[j]) in picked[b, h, where[i]].tolist()
    assert torch.equal(groups.dense(2, 4), seen)
    logits = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(heedful.attention(q, k, v, pattern=groups), logits.softmax(-1) @ v)


def test_rows_may_differ_in_how_many_they_pick() -> None:
    blocks = grid_blocks((6,), (2,))
    picked = torch.tensor([[[[0, 2], [1, -1], [-1, -1]]]])
    seen = block_groups(blocks, blocks, picked, (6, 6)).dense()[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen[::2]] == [[0, 1, 4, 5], [2, 3], []]
    assert torch.equal(seen[::2], seen[1::2])


def test_cost_is_that_of_the_picked_blocks() -> None:
    q = torch.randn(1, 1, 64, 4)
    assert region_topk(q, q, size=(8, 8), block_size=(2, 2), k=3).visited() == 3 / 16


@pytest.mark.door
def test_errors() -> None:
    x = torch.zeros(1, 1, 6, 2)
    with pytest.raises(ValueError, match=r"block_size is \(2, 2\)"):
        grid_blocks((6,), (2, 2))
    with pytest.raises(ValueError, match=r"block_size\[0\] is 0"):
        grid_blocks((6,), (0,))
    with pytest.raises(ValueError, match="k is 4, must be at most the number of key blocks, 3"):
        region_topk(x, x, size=(6,), block_size=(2,), k=4)
    with pytest.raises(ValueError, match="k is 0"):
        block_topk(x, x, 0)
    with pytest.raises(ValueError, match="size is"):
        region_topk(x, x, size=(2, 2), block_size=(2, 2), k=1)
