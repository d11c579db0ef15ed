"""Scatterbrain: dense transcriptions of the local and the hashed form, limits, unbiased features."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from heedful import patterns as p
from heedful.mixers.sparse.scatterbrain import ScatterbrainLocalAttention, ScatterbrainLSHAttention
from heedful.ops import scatterbrain as ops
from heedful.ops.scatterbrain import key_features, orthogonal_projection, query_features
from heedful.routing.lsh import balanced_hashes, lsh_clusters

F64 = torch.float64


def local(seed=0, **given):
    torch.manual_seed(seed)
    return ScatterbrainLocalAttention(12, **{"heads": 2, "window": 4, "features": 8, "dtype": F64, **given})


def hashed(seed=0, **given):
    torch.manual_seed(seed)
    return ScatterbrainLSHAttention(
        12, **{"heads": 2, "cluster_size": 5, "features": 8, "dtype": F64, **given}
    )


def estimate(q, k, projection):
    """phi(q) . phi(k): the mean over the rows w and their negatives of positive features, without tricks."""
    scale = q.shape[-1] ** -0.5
    q, k = q * scale**0.5, k * scale**0.5
    rows = torch.cat([projection, -projection])
    phi_q = (q @ rows.T - q.square().sum(-1, keepdim=True) / 2).exp() / len(rows) ** 0.5
    phi_k = (k @ rows.T - k.square().sum(-1, keepdim=True) / 2).exp() / len(rows) ** 0.5
    return phi_q @ phi_k.T


def transcription(mixer, x, support, *, causal=False, mask=None, source=None):
    """Rows of exp(q . k / sqrt(d)) on the support and of the estimate off it, divided by their sums."""
    source = x if source is None else source
    d, rows = mixer.head_dim, []
    for b in range(x.shape[0]):
        heads = []
        for h in range(mixer.heads):
            own = slice(h * d, (h + 1) * d)
            q, k, v = mixer.query(x[b])[:, own], mixer.key(source[b])[:, own], mixer.value(source[b])[:, own]
            exact = (q @ k.T / math.sqrt(d)).exp()
            a = torch.where(support(b, h), exact, estimate(q, k, mixer.projection))
            if causal:
                a = a.tril()
            if mask is not None:
                a = a * mask[b]
            heads.append(a @ v / a.sum(-1, keepdim=True))
        rows.append(mixer.out(torch.cat(heads, 1)))
    return torch.stack(rows)


def window(n, m, w):
    step = torch.arange(m) - torch.arange(n)[:, None]
    return (step >= -(w // 2)) & (step < (w + 1) // 2)


def assert_same(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((theirs * weight).sum(), leaves),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("w", [1, 4, 7])
def test_local_equals_the_dense_transcription(monkeypatch, w, causal, masked):
    monkeypatch.setattr(ops, "_CELLS", 4096)  # several tiles
    mixer = local(window=w, causal=causal)
    x = torch.randn(2, 37, 12, dtype=F64, requires_grad=True)
    mask = torch.rand(2, 37) < 0.7 if masked else None
    if masked:
        mask[:, 0] = True  # every row sees something
    expected = transcription(mixer, x, lambda b, h: window(37, 37, w), causal=causal, mask=mask)
    assert_same(mixer(x, mask=mask), expected, [x, *mixer.parameters()])


def test_any_pattern_can_be_the_support():
    pattern = p.Blocks(21, 4) | p.Sink(2)
    mixer = local(pattern=pattern)
    x = torch.randn(2, 21, 12, dtype=F64, requires_grad=True)
    expected = transcription(mixer, x, lambda b, h: pattern.mask(21)[0, 0])
    assert_same(mixer(x), expected, [x, *mixer.parameters()])


def test_a_context_of_another_length():
    mixer = local(causal=True)
    x, source = torch.randn(2, 9, 12, dtype=F64), torch.randn(2, 23, 12, dtype=F64)
    expected = transcription(mixer, x, lambda b, h: window(9, 23, 4), source=source)
    torch.testing.assert_close(mixer(x, context=source), expected)


def hash_support(mixer, x, mask=None):
    """Pairs that share a cluster in some round, by the card's transform and hash, per row and head."""
    n, size = x.shape[1], mixer.cluster_size
    seen = torch.zeros(x.shape[0], mixer.heads, n, n, dtype=torch.bool)
    d = mixer.head_dim
    for b, h in itertools.product(range(x.shape[0]), range(mixer.heads)):
        own = slice(h * d, (h + 1) * d)
        q, k = mixer.query(x[b])[:, own], mixer.key(x[b])[:, own]
        live = range(n) if mask is None else mask[b].nonzero()[:, 0].tolist()
        most = max(float(q[i].square().sum()) for i in live) + max(float(k[i].square().sum()) for i in live)
        for r in range(mixer.rounds):
            places = []
            for t, query in ((q, True), (k, False)):
                values = []
                for i in range(n):
                    rest = [math.sqrt(max(0.0, most - float(t[i].square().sum())))]
                    extra = [0.0, *rest] if query else [*rest, 0.0]
                    value = torch.cat([t[i], torch.tensor(extra, dtype=F64)]) @ mixer.directions[:, r]
                    values.append(float(value + mixer.shifts[r]) if i in live else math.inf)
                order = sorted(range(n), key=lambda i, values=values: values[i])
                place = [0] * n
                for rank, i in enumerate(order):
                    place[i] = rank // size
                places.append(place)
            for i, j in itertools.product(range(n), range(n)):
                seen[b, h, i, j] |= places[0][i] == places[1][j]
    return seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
def test_hashed_equals_the_dense_transcription(monkeypatch, rounds, masked):
    monkeypatch.setattr(ops, "_CELLS", 2048)
    mixer = hashed(rounds=rounds)
    x = torch.randn(2, 18, 12, dtype=F64, requires_grad=True)
    mask = torch.rand(2, 18) < 0.7 if masked else None
    with torch.no_grad():
        support = hash_support(mixer, x, mask)
    assert not support.all()
    expected = transcription(mixer, x, lambda b, h: support[b, h], mask=mask)
    ours = mixer(x, mask=mask)
    if masked:
        expected, ours = expected[mask], ours[mask]
    assert_same(ours, expected, [x, *mixer.parameters()])


def test_given_clusters_may_hide_the_future():
    mixer = hashed(rounds=2)
    query, key, value = torch.randn(3, 2, 2, 18, 6, dtype=F64)
    orders = [torch.rand(2, 2, 2, 18).argsort(-1) for _ in "qk"]
    ours = mixer.attend(query, key, value, *orders, causal=True)
    for b, h in itertools.product(range(2), range(2)):
        seen = torch.zeros(18, 18, dtype=torch.bool)
        for r in range(2):
            q_place, k_place = (order[r, b, h].argsort() // 5 for order in orders)
            seen |= q_place[:, None] == k_place
        q, k = query[b, h], key[b, h]
        a = torch.where(seen, (q @ k.T / math.sqrt(6)).exp(), estimate(q, k, mixer.projection)).tril()
        torch.testing.assert_close(ours[b, h], a @ value[b, h] / a.sum(-1, keepdim=True))


def softmax_attention(mixer, x):
    q, k, v = mixer.project(x, x)
    heads = (q @ k.mT * mixer.scale).softmax(-1) @ v
    return mixer.out(heads.transpose(1, 2).flatten(2))


def test_where_all_is_exact_it_is_softmax_attention():
    x = torch.randn(2, 18, 12, dtype=F64)
    for mixer in (local(window=99), hashed(cluster_size=18, rounds=1), hashed(cluster_size=18, rounds=4)):
        torch.testing.assert_close(mixer(x), softmax_attention(mixer, x))


def test_where_nothing_is_exact_it_is_random_feature_attention():
    mixer = local(pattern=~p.Full())
    x = torch.randn(2, 18, 12, dtype=F64)
    expected = transcription(mixer, x, lambda b, h: torch.zeros(18, 18, dtype=torch.bool))
    torch.testing.assert_close(mixer(x), expected)


def test_features_are_unbiased_and_get_better():
    torch.manual_seed(0)
    q, k = 0.7 * torch.randn(2, 1, 1, 6, 8, dtype=F64)
    exact = (q @ k.mT * 8**-0.5).exp()
    errors = []
    for rows in (8, 4000):
        w = orthogonal_projection(rows, 8, dtype=F64)
        (a, la), (b, lb) = query_features(q, w, 8**-0.5), key_features(k, w, 8**-0.5)
        errors.append(float(((a @ b.mT) * (la + lb).exp() / exact - 1).abs().max()))
    assert errors[1] < 0.1 < errors[0]


def test_the_projection_is_orthogonal_in_blocks():
    torch.manual_seed(0)
    w = orthogonal_projection(10, 4, scaling=1, dtype=F64)
    for block in (w[:4], w[4:8], w[8:]):
        torch.testing.assert_close(block @ block.T, 4 * torch.eye(len(block), dtype=F64), atol=1e-5, rtol=0)
    lengths = orthogonal_projection(4000, 4).square().sum(-1)
    assert abs(float(lengths.mean()) - 4) < 0.3  # chi-squared with 4 degrees of freedom
    assert float(lengths.std()) > 1


def test_one_scale_holds_for_all_keys_of_a_head():
    w = orthogonal_projection(4, 6, dtype=F64)
    phi, scale = key_features(5 * torch.randn(2, 3, 9, 6, dtype=F64), w, 6**-0.5)
    assert scale.shape == (2, 3, 1, 1)
    torch.testing.assert_close(phi.amax((2, 3)), torch.ones(2, 3, dtype=F64))


def test_a_state_keeps_the_window_and_sums_alone():
    mixer = local(window=7, causal=True)
    x = torch.randn(2, 40, 12, dtype=F64)
    state, parts = mixer.init_state(2), []
    for piece in x.split((17, 1, 1, 2, 19), 1):
        y, state = mixer(piece, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x))
    assert state.length == 40
    assert state.key.shape == (2, 2, 3, 6)
    assert state.sums.shape == (2, 2, 8, 7)


def test_hashes_of_equal_vectors_are_equal_lengths():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 5, 6, dtype=F64)
    # With the extended axes as directions the hashes are the two extra coordinates.
    directions = torch.zeros(8, 2, dtype=F64)
    directions[6, 0] = directions[7, 1] = 1
    of_q, of_k = balanced_hashes(q, k, directions, torch.zeros(2, dtype=F64))
    most = q.square().sum(-1).amax(-1, keepdim=True) + k.square().sum(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(of_q[1].square() + q.square().sum(-1), most.expand(1, 2, 5))
    torch.testing.assert_close(of_k[0].square() + k.square().sum(-1), most.expand(1, 2, 5))
    assert not of_q[0].any()
    assert not of_k[1].any()


def test_redraw_and_state_dict():
    for mixer in (local(), hashed()):
        x = torch.randn(1, 18, 12, dtype=F64)
        before, other = mixer(x), type(mixer)(**{"dim": 12, "heads": 2, "features": 8, "dtype": F64})
        other.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(mixer.projection, other.projection)
        mixer.redraw()
        assert not torch.allclose(mixer(x), before)


def test_parameter_counts():
    for kind in (ScatterbrainLocalAttention, ScatterbrainLSHAttention):
        mixer = kind(64)
        assert sum(q.numel() for q in mixer.parameters()) == 4 * 64**2 + 64
        assert mixer.projection.shape == (8, 8)  # 8 ln 8 = 16.6 features, of both signs


def test_the_window_is_longer_behind_where_it_is_even():
    assert ScatterbrainLocalAttention(64).support == p.Window(24, 24)  # 49 keys
    assert ScatterbrainLocalAttention(64, window=12).support == p.Window(6, 5)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="features is 1"):
        local(features=1)
    with pytest.raises(ValueError, match="scaling is 2"):
        local(scaling=2)
    with pytest.raises(ValueError, match="window is 0"):
        local(window=0)
    with pytest.raises(ValueError, match="cluster_size is 0"):
        hashed(cluster_size=0)
    with pytest.raises(ValueError, match="state is given"):
        hashed()(torch.zeros(1, 3, 12, dtype=F64), state=local(causal=True).init_state(1))
    x = torch.zeros(1, 3, 12, dtype=F64)
    with pytest.raises(ValueError, match="state is given"):
        local(causal=True)(x, context=x, state=local(causal=True).init_state(1))
    with pytest.raises(ValueError, match="causal is False"):
        local().init_state(1)
    order = torch.arange(6)[None, None]
    with pytest.raises(ValueError, match="gives 3 clusters"):
        lsh_clusters(order, order, query_cluster_size=3, key_cluster_size=2)
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="directions has 3 rows"):
        balanced_hashes(x, x, torch.zeros(3, 1), torch.zeros(1))
