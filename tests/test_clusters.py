"""Routing by clusters: what is selected, by loops."""

from __future__ import annotations

import itertools

import pytest
import torch

import heedful
from heedful.routing.clusters import (
    centroid_scores,
    closest_tokens,
    cluster_nearest,
    cluster_topk,
    nearest_cluster,
)

F64 = torch.float64


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "clusters", "window"),
    [
        (37, 37, 3, 4),
        (5, 37, 3, 4),
        (1, 20, 4, 3),
        (3, 30, 5, 4),
        (40, 40, 5, 50),
        (200, 200, 2, 5),
        (150, 190, 3, 90),
        (9, 9, 1, 1),
        (1, 1, 2, 2),
    ],
)
def test_the_nearest_keys_so_far(n, m, clusters, window, ties, masked):
    torch.manual_seed(n + m)
    of_query = torch.randint(clusters, (2, 3, n))
    scores = torch.randn(2, 3, clusters, m, dtype=F64)
    scores = scores.round() if ties else scores
    mask = torch.rand(2, m) < 0.7 if masked else None
    groups = cluster_nearest(of_query, scores, window=window, key_mask=mask)
    seen = torch.zeros(2, 3, n, m, dtype=torch.bool)
    for b, h, i in itertools.product(range(2), range(3), range(n)):
        row = scores[b, h, of_query[b, h, i]].tolist()
        past = [j for j in range(i + m - n + 1) if mask is None or mask[b, j]]
        seen[b, h, i, sorted(past, key=lambda j: (row[j], j))[-window:]] = True
    assert torch.equal(groups.dense(), seen)
    named = groups.pair_mask().flatten(2).sum(-1)
    assert torch.equal(named, seen.flatten(2).sum(-1))  # no pair is named twice


def test_a_selection_serves_attention_and_passes_no_gradient_through_the_choice():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 29, 8, dtype=F64, requires_grad=True) for _ in range(3))
    means = torch.randn(3, 4, 8, dtype=F64, requires_grad=True)
    groups = cluster_nearest(nearest_cluster(q, means), centroid_scores(k, means), window=5)
    ours = heedful.attention(q, k, v, pattern=groups)
    expected = (q @ k.mT * 8**-0.5).masked_fill(~groups.dense(), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weight).sum(), (q, k, v, means), allow_unused=True)
    assert grads[3] is None
    torch.testing.assert_close(grads[:3], torch.autograd.grad((expected * weight).sum(), (q, k, v)))


def test_what_comes_later_changes_no_row():
    torch.manual_seed(0)
    of_query, scores = torch.randint(3, (1, 1, 133)), torch.randn(1, 1, 3, 133)
    whole = cluster_nearest(of_query, scores, window=4).dense()
    for cut in (1, 7, 64, 65, 132):
        part = cluster_nearest(of_query[..., :cut], scores[..., :cut], window=4).dense()
        assert torch.equal(part, whole[..., :cut, :cut])


def test_a_group_reads_at_most_twice_what_its_queries_see():
    generator = torch.Generator().manual_seed(0)
    of_query = torch.randint(16, (1, 2, 4096), generator=generator)
    groups = cluster_nearest(of_query, torch.randn(1, 2, 16, 4096, generator=generator), window=64)
    assert groups.key_index.shape[-1] <= 128
    assert groups.visited() < 2 * 64 / 4096


@pytest.mark.parametrize("masked", [False, True])
def test_every_centroid_takes_its_nearest_tokens(masked):
    torch.manual_seed(1)
    x, means = torch.randn(2, 3, 17, 5, dtype=F64), torch.randn(3, 4, 5, dtype=F64)
    mask = torch.rand(2, 17) < 0.3 if masked else torch.ones(2, 17, dtype=torch.bool)
    taken = closest_tokens(x, means, 6, mask=mask if masked else None)
    for b, h, c in itertools.product(range(2), range(3), range(4)):
        scores = {t: float(x[b, h, t] @ means[h, c]) for t in range(17) if mask[b, t]}
        best = sorted(sorted(scores, key=lambda t: -scores[t])[:6])
        assert taken[b, h, c].tolist() == best + [-1] * (6 - len(best))
    assert closest_tokens(x, means, 40).shape == (2, 3, 4, 17)


@pytest.mark.parametrize("causal", [False, True])
def test_topk_is_the_mean_over_the_clusters_that_took_a_query(causal):
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 3, 15, 4, dtype=F64)
    means = torch.randn(3, 4, 4, dtype=F64)
    groups = cluster_topk(q, k, means, window=5, causal=causal)
    out = heedful.attention(q, k, v, pattern=groups, scale=1.0)
    for b, h in itertools.product(range(2), range(3)):
        total, count = torch.zeros(15, 4, dtype=F64), [0] * 15
        for c in range(4):
            rows = (q[b, h] @ means[h, c]).argsort(descending=True)[:5].tolist()
            columns = (k[b, h] @ means[h, c]).argsort(descending=True)[:5].tolist()
            for i in rows:
                count[i] += 1
                seen = [j for j in columns if j <= i or not causal]
                if seen:
                    total[i] += (k[b, h, seen] @ q[b, h, i]).softmax(0) @ v[b, h, seen]
        expected = total / (torch.tensor(count, dtype=F64)[:, None] + 1e-2)
        torch.testing.assert_close(out[b, h], expected)
        assert 0 in count
        assert not out[b, h, count.index(0)].any()


@pytest.mark.door
def test_errors():
    none, scores = torch.zeros(1, 1, 3, dtype=torch.long), torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="window is 0"):
        cluster_nearest(none, scores, window=0)
    with pytest.raises(ValueError, match="query_cluster has 3 tokens"):
        cluster_nearest(none, scores[..., :2], window=2)
    with pytest.raises(ValueError, match="key_mask has shape"):
        cluster_nearest(none, scores, window=2, key_mask=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="window is 0"):
        closest_tokens(torch.zeros(1, 1, 3, 2), torch.zeros(1, 2, 2), 0)
