"""Superlinear attention: stripes and spans as told, the two steps by loops, and where gradients flow."""

from __future__ import annotations

import math

import pytest
import torch

import heedful
from heedful.mixers.sparse.superlinear import SuperlinearAttention, superlinear_attention
from heedful.routing import jump_search as search_module
from heedful.routing.jump_search import jump_distances, jump_search, jump_spans
from heedful.routing.spans import span_groups

F64 = torch.float64


def by_hand(search, query, key, value, spans, s, n, backward=2.0, forward=0.0, power=0.5):
    """Steps 1 to 6 for one head: (m', d), (m, d) ...; query i stands at m - m' + i."""
    m = len(key)
    rows = []
    for i in range(len(query)):
        q = m - len(query) + i
        window_len = (s + 1) ** n - 1
        window = [k for k in range(q + 1) if q - k + 1 <= window_len]
        anchors, stripe = [], s + 1
        while q - stripe**n + 1 >= 0:
            anchors.append(q - stripe**n + 1)
            stripe += 1
        scores = [search[i] @ key[a] for a in anchors]
        best = sorted(range(len(anchors)), key=lambda j: -scores[j].item())[:spans]
        parts = []
        for j in best:
            a = anchors[j]
            first = max(0, a - math.ceil(backward * (q + 1) ** power))
            last = min(a + math.ceil(forward * (q + 1) ** power), q)
            if window_len:
                last = min(last, max(0, q - (window_len - 1)) - 1)
            seen = sorted(set(range(first, last + 1)) | set(window))
            weight = (key[seen] @ query[i] / math.sqrt(key.shape[1])).softmax(0)
            parts.append(weight @ value[seen])
        if parts:
            gate = torch.stack([scores[j] for j in best]).softmax(0)
            rows.append((gate[:, None] * torch.stack(parts)).sum(0))
        else:
            rows.append((key[window] @ query[i] / math.sqrt(key.shape[1])).softmax(0) @ value[window])
    return torch.stack(rows)


def test_stripes():
    assert jump_distances(101) == [0, 3, 8, 15, 24, 35, 48, 63, 80, 99]
    assert jump_distances(100)[-1] == 99
    assert jump_distances(99)[-1] == 80
    assert jump_distances(101, window_index=2) == [8, 15, 24, 35, 48, 63, 80, 99]
    assert jump_distances(70, window_index=1, power=3) == [7, 26, 63]
    assert jump_distances(10**6)[-1] == 10**6 - 1  # whole numbers: no root is rounded


@pytest.mark.parametrize(
    ("spans", "s", "n", "forward", "queries"),
    [(3, 0, 2, 0.0, 40), (2, 1, 2, 0.7, 40), (1, 2, 2, 0.0, 7), (2, 1, 3, 1.5, 1), (3, 7, 2, 0.0, 40)],
)
def test_equals_loops(monkeypatch, spans, s, n, forward, queries):
    monkeypatch.setattr(search_module, "_CHUNK", 1)
    torch.manual_seed(spans + s)
    m, d = 40, 4
    leaves = [torch.randn(2, h, t, d, dtype=F64) for h, t in ((4, queries), (4, queries), (2, m), (2, m))]
    leaves = [x.requires_grad_() for x in leaves]
    search, query, key, value = leaves
    options = {"spans": spans, "window_index": s, "power": n, "forward": forward}
    ours = superlinear_attention(search, query, key, value, **options)
    expected = torch.stack(
        [
            torch.stack(
                [
                    by_hand(
                        search[b, h], query[b, h], key[b, h // 2], value[b, h // 2], spans, s, n, 2.0, forward
                    )
                    for h in range(4)
                ]
            )
            for b in range(2)
        ]
    )
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    found = torch.autograd.grad((ours * weight).sum(), leaves, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(found, wanted)
    if spans == 1:
        assert found[0].abs().max() < 1e-12  # one span takes all, whatever its score
    elif s < 5:
        assert found[0].abs().max() > 1e-3


def test_search_passes_gradients_to_its_scores_alone():
    query, key = (torch.randn(1, 2, 30, 3, dtype=F64, requires_grad=True) for _ in range(2))
    anchor, score = jump_search(query, key, spans=2)
    assert not anchor.requires_grad
    live = anchor >= 0
    grad_q, grad_k = torch.autograd.grad(score[live].sum(), (query, key))
    expected_q, expected_k = torch.zeros_like(query), torch.zeros_like(key)
    for h, i, j in live[0].nonzero().tolist():
        a = anchor[0, h, i, j]
        expected_q[0, h, i] += key[0, h, a].detach()
        expected_k[0, h, a] += query[0, h, i].detach()
    torch.testing.assert_close((grad_q, grad_k), (expected_q, expected_k))


def test_wide_window_is_dense_causal_attention():
    q, k, v = (torch.randn(1, 2, 30, 4, dtype=F64) for _ in range(3))
    ours = superlinear_attention(torch.randn_like(q), q, k, v, window_index=5)
    torch.testing.assert_close(ours, heedful.attention(q, k, v, pattern=heedful.patterns.Causal()))


def test_spans_that_can_be_chosen_cover_all_that_came_before():
    for q in range(2000):
        anchor = q - torch.tensor(jump_distances(q + 1))
        first, last = jump_spans(anchor[None, None, None], query_offset=q)
        assert (last == anchor).all()
        # Anchors go back; each span reaches the next anchor, or the start.
        bounds = torch.cat([anchor[1:], torch.tensor([-1])])
        assert (first[0, 0, 0] - 1 <= bounds).all(), q
        assert anchor[0] == q
        assert first[0, 0, 0, -1] == 0


@pytest.mark.parametrize("tile", [1, 5, 64])
@pytest.mark.parametrize("rows", [1, 4])
def test_span_groups_are_the_spans(tile, rows):
    torch.manual_seed(tile)
    n, m = 23, 37
    first = torch.randint(0, m, (2, 3, n))
    last = (first + torch.randint(-3, 12, (2, 3, n))).clamp(max=m - 1)
    groups = span_groups(first, last, m, tile=tile, rows=rows)
    column = torch.arange(m)
    mask = (first[..., None] <= column) & (column <= last[..., None])
    assert torch.equal(groups.dense(), mask)
    q, k, v = (torch.randn(2, 3, t, 4, dtype=F64, requires_grad=True) for t in (n, m, m))
    ours = heedful.attention(q, k, v, pattern=groups, backend="tiled")
    logits = (q @ k.mT / 2).masked_fill(~mask, -torch.inf)
    blind = ~mask.any(-1, keepdim=True)
    expected = logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ v
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
    )


def test_cost_of_spans_is_that_of_what_they_hold():
    n = 4096
    position = torch.arange(n)
    anchor = (torch.rand(1, 1, n) * (position + 1)).long()
    first = (anchor - 127).clamp(min=0)
    groups = span_groups(first, anchor, n)
    assert groups.key_index.shape[3] <= 128 + 256
    assert groups.query_index.shape[2] <= n // 256 + n // 256
    assert groups.visited() < 0.2


@pytest.mark.parametrize("cuts", [(1,) * 21, (9, 1, 0, 11), (21,)])
def test_pieces_equal_the_whole_with_padding(cuts):
    torch.manual_seed(0)
    mixer = SuperlinearAttention(8, heads=2, kv_heads=1, spans=2, window_index=1, dtype=F64)
    x, mask = torch.randn(2, 21, 8, dtype=F64), torch.rand(2, 21) < 0.6
    state, parts, place = mixer.init_state(2), [], 0
    for piece in x.split(cuts, 1):
        y, state = mixer(piece, mask=mask[:, place : place + piece.shape[1]], state=state)
        parts.append(y)
        place += piece.shape[1]
    y = torch.cat(parts, 1)
    for b in range(2):
        at = mask[b].nonzero()[:, 0]
        torch.testing.assert_close(y[b, at], mixer(x[b : b + 1, at])[0])


def test_parameter_count():
    assert (
        sum(p.numel() for p in SuperlinearAttention(64, kv_heads=2).parameters()) == 3 * 64**2 + 2 * 64 * 16
    )


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="power is 1, must be a whole number from 2 to 6"):
        SuperlinearAttention(16, power=1)
    with pytest.raises(ValueError, match="window_index is -1"):
        SuperlinearAttention(16, window_index=-1)
    one = torch.zeros(1, 1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must lie in 0 .. 2"):
        span_groups(one, one + 3, 3)
