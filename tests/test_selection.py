"""Selections: what they stand for and what they cost."""

from __future__ import annotations

import pytest
import torch

from heedful import patterns as p
from heedful.selection import FULL, PARTIAL, BlockTable, TokenGroups


def test_from_tiles_lists_seen_blocks_in_order():
    some = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)[None, None]
    every = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)[None, None]
    table = BlockTable.from_tiles(some, every, (2, 3), (5, 11))
    assert table.count.tolist() == [[[2, 0, 2]]]
    assert [table.index[0, 0, i, :c].tolist() for i, c in enumerate((2, 0, 2))] == [[1, 2], [], [0, 3]]
    assert table.kind[0, 0, 0].tolist() == [FULL, PARTIAL]
    assert table.kind[0, 0, 2].tolist() == [PARTIAL, FULL]


def test_dense_obeys_kind_before_the_mask():
    some = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    every = torch.tensor([[[[True, False]]]])
    table = BlockTable.from_tiles(some, every, (2, 2), (2, 4), lambda b, h, q, k: q + k == 3)
    assert table.dense()[0, 0].int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 0]]


def test_visited_counts_cut_blocks_by_what_they_hold():
    table = p.Full().block_table(5, 7, block_size=(2, 3))
    assert table.visited() == pytest.approx(1.0)
    table = p.Window(0).block_table(4, block_size=(2, 2))
    assert table.visited() == pytest.approx(0.5)
    window = p.Window(256).block_table(4096)
    assert window.visited() == pytest.approx((32 * 5 - 6) / 32**2)


def test_groups_count_live_pairs_only():
    groups = TokenGroups(
        torch.tensor([[[[0, 1], [2, -1]]]]), torch.tensor([[[[0, 3, -1], [1, -1, -1]]]]), (3, 4)
    )
    assert groups.visited() == pytest.approx((4 + 1) / 12)
    assert groups.dense()[0, 0].int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0]]


def test_tables_of_long_patterns_hold_no_dense_buffer():
    """A window over 2^17 tokens (2^34 pairs) is a table of 128 x 3 blocks."""
    table = p.Window(256).block_table(1 << 17, block_size=(1024, 1024))
    assert table.index.shape == (1, 1, 128, 3)


@pytest.mark.door
def test_errors_at_the_door():
    zero = torch.zeros(1, 1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="count has 2 query blocks, must have 3"):
        BlockTable(zero, zero[..., None], zero[..., None].to(torch.uint8), (2, 2), (6, 6))
    with pytest.raises(ValueError, match="do not fit"):
        BlockTable(zero, zero, zero.to(torch.uint8), (2, 2), (4, 4))
    index = torch.zeros(1, 1, 2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="key_index 1"):
        TokenGroups(index, index[:, :, :1], (4, 4))
    with pytest.raises(ValueError, match="key_bias ends in"):
        TokenGroups(index, index, (4, 4), key_bias=torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="do not join"):
        p.PerHead([p.Full(), p.Causal()]) & p.PerHead([p.Full()] * 3)
