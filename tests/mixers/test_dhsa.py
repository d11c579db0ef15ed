"""DHSA: strict and published choice of keys by loops, the predictor by hand, labels, gradients and state."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import heedful
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.dhsa import DynamicHierarchicalSparseAttention
from heedful.routing.boundary_predictor import (
    BoundaryPredictor,
    attention_ratios,
    boundary_loss,
    greedy_boundaries,
    peak_boundaries,
)
from heedful.routing.chunk_topk import chunk_scores, chunk_topk, key_groups

F64 = torch.float64


def build(seed=0, **options):
    torch.manual_seed(seed)
    mixer = DynamicHierarchicalSparseAttention(
        **{**DynamicHierarchicalSparseAttention.example, "boundary_loss": False, "dtype": F64, **options}
    )
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixer


def turned(x, position):
    d = x.shape[-1]
    angle = position * 10000.0 ** (-torch.arange(0, d, 2, dtype=F64) / d)
    u, v = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()], -1)


def heads_of(mixer, x):
    n, d = len(x), mixer.head_dim
    q, k, v = ((layer.weight @ x.T).T.view(n, -1, d) for layer in (mixer.query, mixer.key, mixer.value))
    q, k = (torch.stack([turned(row, t) for t, row in enumerate(y)]) for y in (q, k))
    return q, k, v


def logit_by_hand(predictor, x, t):
    """Steps of the predictor for one gap; x (n, c)."""
    w, (n, c) = predictor.window, x.shape
    mha = predictor.attention
    zero = x.new_zeros(c)
    window = torch.stack([x[j] if 0 <= j < n else zero for j in range(t - w + 1, t + w + 1)])
    q, k, v = (window @ mha.in_proj_weight.T + mha.in_proj_bias).chunk(3, -1)
    d = c // mha.num_heads
    parts = []
    for h in range(mha.num_heads):
        own = slice(h * d, (h + 1) * d)
        parts.append((q[:, own] @ k[:, own].T / math.sqrt(d)).softmax(-1) @ v[:, own])
    mixed = torch.cat(parts, -1) @ mha.out_proj.weight.T + mha.out_proj.bias
    mean, var = mixed.mean(-1, keepdim=True), mixed.var(-1, unbiased=False, keepdim=True)
    encoded = (mixed - mean) / (var + 1e-5).sqrt() * predictor.norm.weight + predictor.norm.bias
    a, b = encoded[:w].mean(0), encoded[w:].mean(0)
    cosine = (a @ b / (a.norm() * b.norm()))[None]
    feature = torch.cat([a, b, (a - b).abs(), a * b, cosine])
    first, last = predictor.mlp[0], predictor.mlp[2]
    return (last.weight @ (first.weight @ feature + first.bias).clamp(min=0) + last.bias)[0]


def fill(chunks, scores, low, high, slots):
    """Tokens of chunks (lists), best first, of those in [low, high), up to `slots`."""
    picked = []
    for c in sorted(range(len(chunks)), key=lambda c: (-scores[c], c)):
        picked += [j for j in chunks[c] if low <= j < high]
    return picked[:slots]


def score(query, keys):
    return (query @ torch.stack(keys).mean(0)).item() * math.sqrt(len(keys))


def attend(q, k, v, t, keys):
    share = q.shape[1] // k.shape[1]
    rows = []
    for h in range(q.shape[1]):
        weight = (k[keys, h // share] @ q[t, h] / math.sqrt(q.shape[2])).softmax(0)
        rows.append(weight @ v[keys, h // share])
    return torch.cat(rows)


def strict(mixer, x):
    """The strict form of one sequence: for each token only what was known at the first token of its block."""
    q, k, v = heads_of(mixer, x)
    n, size = len(x), mixer.block_size
    means, query = k.mean(1).detach(), q.mean(1).detach()
    logits = {}
    if mixer.predictor is not None:
        tokens = k.flatten(1).detach()
        w, reach = mixer.predictor.window, mixer.nms_window
        logits = {t: logit_by_hand(mixer.predictor, tokens, t).item() for t in range(w - 1, n - w)}
    rows = []
    for t in range(n):
        p0 = t // size * size
        ends = []
        if mixer.chunk_size is not None:
            ends = list(range(mixer.chunk_size, p0 + 1, mixer.chunk_size))
        else:
            for g in sorted(logits):
                if g + reach + w > p0 or logits[g] <= mixer.threshold:
                    continue
                around = [logits[o] for o in range(g - reach, g + reach + 1) if o != g and o in logits]
                if all(logits[g] > other for other in around):
                    ends.append(g + 1)
        starts = [0, *ends]
        chunks = [list(range(a, z)) for a, z in zip(starts, [*ends, p0], strict=True) if z > a]
        block = query[max(0, p0 - size + 1) : p0 + 1].sum(0)
        scores = [score(block, [means[j] for j in chunk]) for chunk in chunks]
        high = p0 + size
        local = min(high, mixer.local_tokens, mixer.budget)
        pinned = min(high - local, mixer.global_tokens, mixer.budget - local)
        keys = {*range(pinned), *range(high - local, high)}
        keys |= set(fill(chunks, scores, pinned, high - local, mixer.budget - local - pinned))
        rows.append(mixer.out.weight @ attend(q, k, v, t, sorted(j for j in keys if j <= t)))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [None, 2, 5])
def test_strict_form_equals_loops(chunk_size):
    mixer = build(chunk_size=chunk_size)
    x = torch.randn(2, 32, 16, dtype=F64, requires_grad=True)
    y, expected = mixer(x), torch.stack([strict(mixer, row) for row in x])
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *(getattr(mixer, name).weight for name in ("query", "key", "value", "out"))]
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )
    if mixer.predictor is not None:
        assert not any(p.requires_grad for p in mixer.predictor.parameters())
        accepted = peak_boundaries(
            mixer.predictor(heads_of(mixer, x[0].detach())[1].flatten(1)[None]), threshold=0.0, distance=1
        )
        assert accepted.sum() > 3  # the choice is no trivial one


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("cuts", [(1,) * 31, (10, 1, 0, 2, 18), (3, 28)])
def test_pieces_with_padding(chunk_size, cuts):
    mixer = build(chunk_size=chunk_size)
    x, mask = torch.randn(2, 31, 16, dtype=F64), torch.rand(2, 31) < 0.7
    state, parts, place = mixer.init_state(2), [], 0
    for piece in x.split(cuts, 1):
        y, state = mixer(piece, mask=mask[:, place : place + piece.shape[1]], state=state)
        parts.append(y)
        place += piece.shape[1]
        assert state.recent.shape[2] <= int(state.count.max() - state.count.min()) + 2 * mixer.block_size
    y = torch.cat(parts, 1)
    for b in range(2):
        at = mask[b].nonzero()[:, 0]
        torch.testing.assert_close(y[b, at], mixer(x[b : b + 1, at], positions=at)[0])


def published(query, key, bounds, size, budget, local, pinned, window=None, duplicates=False):
    """Steps 3 to 6 for one row: query (h, n, d), key (h2, m, d)."""
    m = key.shape[1]
    budget = min(budget, m, window or m)
    means = key.mean(0)
    rows = []
    for p0 in range(0, query.shape[1], size):
        block = query[:, p0 : p0 + size].mean(0).sum(0)
        chunks = [list(range(a, z)) for a, z in pairwise(bounds) if z > a]
        scores = [score(block, [means[j] for j in chunk]) for chunk in chunks]
        high = min(p0 + size, m)
        low = max(0, high - window) if window else 0
        near = min(local, budget, high - low)
        far = 0 if duplicates else min(pinned, high - low - near, budget - near)
        keys = [*range(low, low + far), *range(high - near, high)]
        keys = sorted(keys + fill(chunks, scores, low + far, high - near, budget - near - far))
        if duplicates:
            keys += [m - 1] * (budget - len(keys))
            start = max(0, p0 - window) if window else 0
            for g in range(min(pinned, budget)):
                keys[g] = min(start + g, high - 1)
        rows.append(keys)
    return rows


@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("duplicates", [False, True])
def test_published_choice_equals_loops(window, duplicates):
    torch.manual_seed(1)
    query, key = torch.randn(2, 4, 26, 3, dtype=F64), torch.randn(2, 2, 31, 3, dtype=F64)
    bounds = torch.tensor([[0, 4, 5, 11, 18, 25, 31], [0, 2, 9, 16, 30, 31, 31]])
    keys = chunk_topk(
        query,
        key,
        bounds,
        block_size=4,
        budget=12,
        local_tokens=5,
        global_tokens=3,
        window=window,
        authors_duplicates=duplicates,
    )
    for b in range(2):
        expected = published(query[b], key[b], bounds[b].tolist(), 4, 12, 5, 3, window, duplicates)
        assert [[j for j in row if j >= 0] for row in keys[b].tolist()] == expected
        if not duplicates:
            assert all(len(set(row)) == len(row) for row in expected)
    if duplicates:
        assert any(len(set(row)) < len(row) for b in range(2) for row in keys[b].tolist())
    # What a key that stands twice weighs: it counts twice, forward and backward, in every backend.
    q, k, v = (torch.randn(2, 2, t, 3, dtype=F64, requires_grad=True) for t in (26, 31, 31))
    groups = key_groups(keys, block_size=4, n=26, m=31)
    rows = []
    for b in range(2):
        for t in range(26):
            at = [j for j in keys[b, t // 4].tolist() if 0 <= j <= t]
            weight = ((q[b, :, t, None] * k[b][:, at]).sum(-1) / math.sqrt(3)).softmax(-1)
            rows.append((weight[..., None] * v[b][:, at]).sum(1))
    expected = torch.stack(rows).view(2, 26, 2, 3).transpose(1, 2)
    loss = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * loss).sum(), (q, k, v))
    for backend in ("reference", "tiled"):
        y = heedful.attention(q, k, v, pattern=groups, query_offset=0, backend=backend)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad((y * loss).sum(), (q, k, v)), wanted)


def test_published_form_of_the_mixer():
    mixer = build(selection="paper", instruction_tokens=4, nms_window=2, chunk_beta=1)
    assert not mixer.causal
    x = torch.randn(2, 29, 16, dtype=F64)
    y, state = mixer(x, state=mixer.init_state(2))
    for b in range(2):
        q, k, v = heads_of(mixer, x[b])
        logits = {t: logit_by_hand(mixer.predictor, k.flatten(1), t).item() for t in range(1, 27)}
        taken = [25]
        for t in sorted((t for t in logits if logits[t] > 0.0), key=lambda t: -logits[t]):
            if len(taken) < 29 // 3 and t <= 25 and all(abs(t - o) > 2 for o in taken):
                taken.append(t)
        bounds = [0, *sorted(t + 1 for t in taken), 29]
        rows = published(q[:25].transpose(0, 1), k.transpose(0, 1), bounds, 3, 9, 4, 1)
        for t in range(29):
            keys = [j for j in rows[t // 3] if j <= t] if t < 25 else list(range(t + 1))
            torch.testing.assert_close(y[b, t], mixer.out.weight @ attend(q, k, v, t, keys))
    # Later tokens see everything.
    more = torch.randn(2, 2, 16, dtype=F64)
    z, state = mixer(more, state=state)
    whole = torch.cat([x, more], 1)
    for t in (29, 30):
        q, k, v = heads_of(mixer, whole[0])
        torch.testing.assert_close(z[0, t - 29], mixer.out.weight @ attend(q, k, v, t, list(range(t + 1))))
    assert state.length == 31


def test_large_budget_is_dense_causal_attention():
    mixer = build(budget=40, chunk_size=4)
    dense = SelfAttention(16, heads=4, kv_heads=2, causal=True, rotary=True, qkv_bias=False, dtype=F64)
    dense.load_state_dict({**mixer.state_dict(), "out.bias": torch.zeros(16, dtype=F64)})
    x = torch.randn(1, 32, 16, dtype=F64)
    torch.testing.assert_close(mixer(x), dense(x))


def test_four_times_the_length_doubles_the_score():
    key = torch.randn(1, 1, 3, dtype=F64).expand(1, 20, 3)
    query = torch.randn(1, 1, 3, dtype=F64)
    start, stop = torch.tensor([[[0, 4]]]), torch.tensor([[[4, 20]]])
    short, long = chunk_scores(query, key, start, stop)[0, 0]
    torch.testing.assert_close(long, 2 * short)
    short, long = chunk_scores(query, key, start, stop, norm=False)[0, 0]
    torch.testing.assert_close(long, short)


def test_predictor_equals_loops():
    torch.manual_seed(0)
    predictor = BoundaryPredictor(6, heads=2, window=3, hidden=5, dtype=F64)
    x = torch.randn(2, 11, 6, dtype=F64, requires_grad=True)
    y = predictor(x)
    expected = torch.stack([torch.stack([logit_by_hand(predictor, row, t) for t in range(11)]) for row in x])
    torch.testing.assert_close(y, expected)
    leaves = [x, *predictor.parameters()]
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )
    c, hidden = 1024, 256
    count = sum(p.numel() for p in BoundaryPredictor(c, device="meta").parameters())
    assert count == 4 * c * c + 4 * c + 2 * c + (4 * c + 1) * hidden + hidden + hidden + 1


def test_choice_among_gaps():
    scores = torch.tensor([[5.0, 1.0, 3.0, 3.0, 0.5, 4.0, 0.1, 2.0, 2.0]])
    # The end, 7, is taken whatever its score; then 0, 5 and 2, which comes before 3 of equal score.
    chosen = greedy_boundaries(scores, threshold=1.1, most=4, distance=1, end=7)
    assert chosen == [[0, 2, 5, 7]]
    assert greedy_boundaries(scores, threshold=1.1, most=2, distance=1, end=7) == [[0, 7]]
    peaks = peak_boundaries(scores, threshold=1.1, distance=1)[0].nonzero()[:, 0].tolist()
    assert peaks == [0, 2, 5, 7]
    assert peak_boundaries(scores, threshold=1.1, distance=3)[0].nonzero()[:, 0].tolist() == [0, 5]


def test_labels_equal_dense_attention():
    torch.manual_seed(2)
    n, w = 23, 3
    query, key = torch.randn(1, 4, n, 3, dtype=F64), torch.randn(1, 2, n, 3, dtype=F64)
    logits = query[0] @ key[0].repeat_interleave(2, 0).mT / math.sqrt(3)
    a = logits.masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf).softmax(-1).mean(0)
    expected = torch.zeros(n, dtype=F64)
    for t in range(2 * w - 1, n - 2 * w):
        past = a[t + w :, t - w + 1 : t + 1].sum()
        future = a[t + w :, t + 1 : t + w + 1].sum()
        expected[t] = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    torch.testing.assert_close(attention_ratios(query, key, window=w)[0], expected)
    guess = torch.randn(n, dtype=F64, requires_grad=True)
    total, count = 0, 0
    for t in range(n):
        if expected[t] > 0:
            target, p = expected[t] ** 4 / (1 + expected[t] ** 4), guess[t].sigmoid()
            cross = -(3 * target * p.log() + (1 - target) * (1 - p).log())
            total = total + (1 - p * target - (1 - p) * (1 - target)) ** 2 * cross
            count += 1
    loss = boundary_loss(guess[None], expected[None], positive_weight=3.0)
    torch.testing.assert_close(loss, total / count)
    torch.testing.assert_close(torch.autograd.grad(loss, guess), torch.autograd.grad(total / count, guess))


def test_boundary_loss_trains_the_predictor_alone():
    mixer = build(boundary_loss=True).train()
    x = torch.randn(2, 20, 16, dtype=F64, requires_grad=True)
    mixer(x)
    loss = mixer.aux_losses["boundary"]
    grads = torch.autograd.grad(loss, list(mixer.predictor.parameters()), retain_graph=True)
    assert all(g.abs().max() > 0 for g in grads)
    rest = torch.autograd.grad(loss, [x, mixer.query.weight, mixer.key.weight], allow_unused=True)
    assert rest == (None, None, None)
    # Masked tokens are none: the loss is that of rows without them.
    mask = torch.ones(2, 26, dtype=torch.bool)
    mask[:, :6] = False
    padded = torch.cat([torch.randn(2, 6, 16, dtype=F64), x.detach()], 1)
    mixer(padded, mask=mask, positions=torch.arange(26) - 6)
    torch.testing.assert_close(mixer.aux_losses["boundary"], loss)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="boundary_loss is True, must be False with a chunk_size"):
        DynamicHierarchicalSparseAttention(16, chunk_size=4, boundary_loss=True)
    with pytest.raises(ValueError, match="selection is 'exact', must be one of"):
        DynamicHierarchicalSparseAttention(16, selection="exact")
    with pytest.raises(ValueError, match="mask is given, must be None with selection='paper'"):
        build(selection="paper")(torch.zeros(1, 3, 16, dtype=F64), mask=torch.ones(1, 3, dtype=torch.bool))
