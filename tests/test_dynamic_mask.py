"""Routing by the worth of keys: what is selected, by loops."""

from __future__ import annotations

import itertools

import pytest
import torch

import heedful
from heedful.routing.dynamic_mask import global_topk, running_topk, topk_bias_mask

F64 = torch.float64


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "keep"),
    [(37, 37, 5), (70, 70, 20), (7, 50, 6), (1, 30, 4), (1, 3, 8), (20, 20, 100), (5, 5, 1), (49, 49, 3)],
)
def test_each_query_keeps_the_best_keys_so_far(n, m, keep, ties, masked):
    torch.manual_seed(m)
    scores = torch.randint(3, (2, 2, m)).double() if ties else torch.randn(2, 2, m, dtype=F64)
    mask = torch.rand(2, m) < 0.6 if masked else None
    groups = running_topk(scores, keep, queries=n, key_mask=mask)
    seen = torch.zeros(2, 2, n, m, dtype=torch.bool)
    for b, h, i in itertools.product(range(2), range(2), range(n)):
        past = [j for j in range(i + m - n + 1) if mask is None or mask[b, j]]
        seen[b, h, i, sorted(past, key=lambda j: (float(scores[b, h, j]), j))[-keep:]] = True
    ours = groups.dense(2, 2)
    assert torch.equal(ours if mask is None else ours & mask[:, None, None], seen)


def test_selection_serves_attention_and_passes_no_gradient():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 45, 8, dtype=F64, requires_grad=True) for _ in range(3))
    scores = torch.randn(2, 3, 45, dtype=F64, requires_grad=True)
    groups = running_topk(scores, 7)
    ours = heedful.attention(q, k, v, pattern=groups)
    expected = (q @ k.mT * 8**-0.5).masked_fill(~groups.dense(2, 3), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weight).sum(), (q, k, v, scores), allow_unused=True)
    assert grads[3] is None
    torch.testing.assert_close(grads[:3], torch.autograd.grad((expected * weight).sum(), (q, k, v)))


def test_equal_scores_keep_the_latest_keys():
    seen = running_topk(torch.ones(1, 1, 40), 5).dense()[0, 0]
    window = torch.ones(40, 40, dtype=torch.bool).tril() & torch.ones(40, 40, dtype=torch.bool).triu(-4)
    assert torch.equal(seen, window)


def test_groups_read_little_more_than_their_queries_see():
    groups = running_topk(torch.randn(1, 2, 4096), 512)
    assert groups.key_index.shape[-1] == 512 + 128
    assert groups.visited() < 1.3 * 512 / 4096


def test_the_best_keys_of_all():
    torch.manual_seed(1)
    scores, mask = torch.randn(2, 2, 300), torch.rand(2, 300) < 0.7
    seen = global_topk(scores, 9, key_mask=mask).dense()
    for b, h in itertools.product(range(2), range(2)):
        best = sorted(mask[b].nonzero()[:, 0].tolist(), key=lambda j: -float(scores[b, h, j]))[:9]
        for i in (0, 1, 57, 255, 256, 299):
            assert seen[b, h, i].nonzero()[:, 0].tolist() == sorted(j for j in best if j <= i)


def test_dense_masks_of_biases():
    torch.manual_seed(2)
    bias = torch.randn(2, 3, 5, 11)
    mask = torch.ones(5, 11, dtype=torch.bool).tril(2)[None, None]
    topk, relu = topk_bias_mask(bias, 4, mask=mask), topk_bias_mask(bias, mask=mask, kind="relu")
    blocks = topk_bias_mask(bias, 4, mask=mask, block_size=3)
    whole = topk_bias_mask(bias[:, :, :1], 4)
    for b, h, i in itertools.product(range(2), range(3), range(5)):
        row = bias[b, h, i].tolist()
        kept = sorted(range(min(11, i + 3)), key=lambda j: -row[j])[:4]
        assert topk[b, h, i].nonzero()[:, 0].tolist() == sorted(kept)
        assert relu[b, h, i].nonzero()[:, 0].tolist() == [j for j in range(i + 3) if row[j] > 0]
        smooth = []
        for block in ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10)):
            if 2 * len(set(block) & set(kept)) > len(block):
                smooth += block
        assert blocks[b, h, i].nonzero()[:, 0].tolist() == smooth
    for b, h in itertools.product(range(2), range(3)):
        best = bias[b, h, 0].argsort(descending=True)[:4]
        assert whole[b, h, 0].nonzero()[:, 0].tolist() == sorted(best.tolist())
    assert topk_bias_mask(bias, 50).all()


@pytest.mark.door
def test_errors():
    scores = torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="keep is 0"):
        running_topk(scores, 0)
    with pytest.raises(ValueError, match="keep is 0"):
        global_topk(scores, 0)
    with pytest.raises(ValueError, match="key_mask has shape"):
        running_topk(scores, 2, key_mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="kind is 'best'"):
        topk_bias_mask(scores[None], 2, kind="best")
    with pytest.raises(ValueError, match="keep is None"):
        topk_bias_mask(scores[None])
