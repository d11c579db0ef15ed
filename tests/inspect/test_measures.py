"""Measures on attention against loops over their definitions, and where theory knows the answer."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from heedful import inspect as look
from heedful.inspect import Site, Visibility
from heedful.patterns import Causal

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64


def causal(n, heads=1, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(heads, n, n, dtype=torch.float64) * 2
    return logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def uniform(n):
    return torch.ones(n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1, dtype=torch.float64)[:, None]


def test_distance_and_entropy_by_loops():
    w = causal(7, 3)[:, 2:]  # rows 2..6
    for head in range(3):
        for r in range(5):
            row = w[head, r].tolist()
            far = sum(a * abs(r + 2 - j) for j, a in enumerate(row))
            spread = -sum(a * math.log(a) for a in row if a > 0)
            assert look.attention_distance(w)[head, r].item() == pytest.approx(far, abs=1e-12)
            assert look.attention_entropy(w)[head, r].item() == pytest.approx(spread, abs=1e-12)
    queries = torch.tensor([4, 6])
    expected = look.attention_distance(w)[:, [2, 4]]
    torch.testing.assert_close(look.attention_distance(w[:, [2, 4]], queries=queries), expected, **EXACT)
    share = look.attention_entropy(uniform(6), visible=uniform(6) > 0)
    torch.testing.assert_close(share, torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64), **EXACT)


def test_strength_by_hop():
    distances = look.grid_distances(3, 4)
    for i in range(12):
        for j in range(12):
            assert distances[i, j] == max(abs(i // 4 - j // 4), abs(i % 4 - j % 4))
    assert look.grid_distances(2, 2, euclidean=True)[0, 3].item() == pytest.approx(2**0.5)
    w = torch.randn(2, 12, 12, dtype=torch.float64).softmax(-1)
    mass, strength = look.attention_strength_by_hop(w, distances)
    for k in range(4):
        rows = [[w[1, i, j].item() for j in range(12) if distances[i, j] == k] for i in range(12)]
        assert mass[1, k].item() == pytest.approx(sum(sum(r) for r in rows) / 12)
        have = [sum(r) / len(r) for r in rows if r]
        assert strength[1, k].item() == pytest.approx(sum(have) / len(have))
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, dtype=torch.float64), **EXACT)
    flat = torch.full((12, 12), 1 / 12, dtype=torch.float64)
    neighbours = torch.stack([(distances == k).sum() for k in range(4)]).double()
    mass, strength = look.attention_strength_by_hop(flat, distances)
    torch.testing.assert_close(mass, neighbours / 144, **EXACT)
    torch.testing.assert_close(strength, torch.full((4,), 1 / 12, dtype=torch.float64), **EXACT)


def test_waad_and_fai_by_loops():
    w = causal(20, 2)
    queries = torch.arange(5, 20)
    near, future = look.waad(w[:, 5:], window=4), look.fai(w[:, 5:], horizon=(2, 6))
    for head in range(2):
        for r, t in enumerate(queries.tolist()):
            looked = sum(w[head, t, s].item() * min(t - s, 4) for s in range(t + 1))
            assert near[head, r].item() == pytest.approx(looked)
        for s in range(20):
            rows = [w[head, t, s].item() for t in queries.tolist() if s + 2 <= t <= s + 6]
            assert future[head, s].item() == pytest.approx(sum(rows) / len(rows) if rows else 0.0)


def test_rhythm_where_the_answer_is_known():
    n = 200
    flat = uniform(n)
    torch.testing.assert_close(
        look.attention_distance(flat), torch.arange(n, dtype=torch.float64) / 2, rtol=1e-9, atol=1e-9
    )
    assert look.waad(flat)[-1] > 9.5  # W = 10 far from the start
    own = torch.eye(n, dtype=torch.float64)
    assert not look.waad(own).any() and not look.fai(own).any() and not look.attention_distance(own).any()
    first = torch.zeros(n, n, dtype=torch.float64)
    first[:, 0] = 1
    assert look.attention_distance(first).mean().item() == pytest.approx((n - 1) / 2)
    anchors = look.fai(first)
    assert anchors[0] == 1 and not anchors[1:].any()


def site(weights):
    """A call with these weights: queries are their logarithms, keys one-hot."""
    h, n, m = weights.shape
    key = torch.eye(m, dtype=torch.float64).expand(1, h, m, m)
    told = Visibility(pattern=Causal(), bias=None, key_mask=None, query_offset=m - n)
    logits = weights.clamp(min=1e-300).log()[None]
    return Site(nn.Identity(), "0.attn", 0, False, logits, key, key, 1.0, told)


def test_rhythm_profile_streams_what_the_formulas_say():
    w = causal(30, 10)
    profile = look.RhythmProfile(response=slice(4, None), window=5, horizon=(2, 9))
    call = site(w)
    torch.testing.assert_close(call.weights()[0], w, rtol=1e-9, atol=1e-12)
    call.pieces = lambda: (slice(i, min(i + 7, 30)) for i in range(0, 30, 7))
    profile(call)
    distance = look.attention_distance(w).narrow(1, 4, 26).mean(1)
    torch.testing.assert_close(profile.head_distance()[0].double(), distance, rtol=1e-5, atol=1e-6)  # float32
    order = distance.argsort()
    near = look.waad(w, window=5)[order[:3]].mean(0)[4:]
    far = look.fai(w[:, 4:], horizon=(2, 9))[order[-3:]].mean(0)
    torch.testing.assert_close(profile.waad().double(), near, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(profile.fai().double(), far, rtol=1e-5, atol=1e-6)


def test_credit():
    waad = torch.tensor([1.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    fai = torch.tensor([0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.8, 0.0, 0.0])
    local = look.rhythm_credit(waad, fai, kind="local", top=0.2)
    assert local.tolist() == [1.5, 1.5] + [1.0] * 8
    distant = look.rhythm_credit(waad, fai, kind="global", top=0.2)
    assert distant.tolist() == [1.0] * 3 + [1.5] + [1.0] * 3 + [1.5] + [1.0] * 2
    # The anchor at 3 is dominated by the peak before it, that at 7 has none near.
    joined = look.rhythm_credit(waad, fai, top=0.2)
    assert joined.tolist() == [1.25, 1.0, 1.0, 1.25, 1.0, 1.0, 1.0, 1.5, 1.0, 1.0]
    assert look.rhythm_credit(waad, fai, amplification=1.0).tolist() == [1.0] * 10


def test_sinks():
    w = uniform(12)[None].repeat(2, 1, 1) * 0.2
    w[0, :, 0] += 0.8
    w[1] /= 0.2
    received, seen = look.received_attention(w, w[0] > 0)
    mean = received / seen
    for j in range(12):
        assert mean[0, j].item() == pytest.approx(w[0, j:, j].mean().item())
    sinks = look.find_sinks(mean)
    assert sinks[0].tolist() == [True] + [False] * 11
    pieces = [look.received_attention(w[:, i : i + 5], w[0, i : i + 5] > 0) for i in (0, 5, 10)]
    torch.testing.assert_close(sum(p[0] for p in pieces), received, **EXACT)
    torch.testing.assert_close(sum(p[1] for p in pieces), seen, **EXACT)


def test_massive_activations_and_sink_tokens():
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 40) * 0.1
    hidden[0, 0, 7], hidden[1, 3, 9] = 200.0, -300.0
    found = look.massive_activations(hidden)
    assert found.nonzero().tolist() == [[0, 0, 7], [1, 3, 9]]
    score = look.sink_score(hidden, [7, 9])
    x = hidden[1, 3].double()
    assert score[1, 3].item() == pytest.approx(300 / math.sqrt(x.square().mean() + 1e-6), rel=1e-6)
    assert look.find_sink_dims(hidden[0])[0] == 7
    assert look.find_sink_tokens(hidden, dims=[7, 9], threshold=6.0).nonzero().tolist() == [[0, 0], [1, 3]]


def test_rollout_by_loops():
    layers = [causal(5, 2, seed)[None] for seed in range(3)]
    rollout = look.AttentionRollout(residual=0.3)
    expected = torch.eye(5, dtype=torch.float64)
    for w in layers:
        rollout.add(w)
        step = torch.zeros(5, 5, dtype=torch.float64)
        for i in range(5):
            for j in range(5):
                step[i, j] = 0.7 * (w[0, 0, i, j] + w[0, 1, i, j]) / 2 + 0.3 * (i == j)
        expected = step @ expected
    torch.testing.assert_close(rollout.table[0], expected, **EXACT)
    torch.testing.assert_close(rollout.table.sum(-1), torch.ones(1, 5, dtype=torch.float64), **EXACT)


def test_flow_equals_the_smallest_cut():
    from itertools import product

    layers = [causal(3, 2, seed) for seed in range(2)]
    tables = [look.with_residual(w.mean(0)) for w in layers]
    found = look.attention_flow(layers, 2)
    for target in range(3):
        cuts = []
        # Nodes on the side of the source: (2, 2) always, (0, target) never; the others as they may.
        nodes = product(range(3), range(3))
        free = [node for node in nodes if node not in ((2, 2), (0, target))]
        for sides in product((False, True), repeat=len(free)):
            inside = {(2, 2)} | {node for node, side in zip(free, sides, strict=True) if side}
            cut = sum(
                tables[layer - 1][i, j].item()
                for layer, i, j in product((1, 2), range(3), range(3))
                if (layer, i) in inside and (layer - 1, j) not in inside
            )
            cuts.append(cut)
        assert found[target].item() == pytest.approx(min(cuts))


def test_pruned_heads_of_timm_and_torch():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=12, num_heads=3).eval()
    vit.blocks[1].attn.proj.weight.data[:, 4:8] = 0  # head 1 of layer 1 goes nowhere
    x = torch.randn(3, 3, 32, 32)
    told = []
    for measure in (look.cosine_distance, look.jensen_shannon):
        found = look.head_importance_by_pruning(
            vit, lambda: vit(x), measure=measure, on_head=lambda *done: told.append(done)
        )
        assert found.heads[4] == ("blocks.1.attn", 1, 1)
        assert found.samples.shape == (6, 3)
        assert found.samples[4].abs().max() < 1e-12 and (found.mean[[0, 1, 2, 3, 5]] > 1e-9).all()
    assert told[5] == (6, 6)
    encoder = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    cut = nn.Sequential(nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False)).eval()
    y = torch.randn(2, 4, 12)
    layer = cut[0].layers[0]
    with torch.no_grad(), look.silenced(cut, [("0.layers.0.self_attn", 2)]):
        silent = cut(y)
    with torch.no_grad():
        assert not torch.allclose(cut(y), silent)
        layer.self_attn.out_proj.weight[:, 8:] = 0
        torch.testing.assert_close(cut(y), silent, rtol=1e-5, atol=1e-6)  # float32


def test_importance_measures():
    torch.manual_seed(0)
    before, after = torch.randn(5, 4), torch.randn(5, 4)
    labels = torch.tensor([0, 1, 2, 3, 0])
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    for i in range(5):
        m = (p[i] + q[i]) / 2
        js = ((p[i] * (p[i] / m).log()).sum() + (q[i] * (q[i] / m).log()).sum()) / 2
        assert look.jensen_shannon(before, after)[i].item() == pytest.approx(js.item())
        drop = (p[i, labels[i]] - q[i, labels[i]]).item()
        assert look.probability_drop(before, after, labels)[i].item() == pytest.approx(drop)
        lost = (p[i].argmax() == labels[i]).double() - (q[i].argmax() == labels[i]).double()
        assert look.accuracy_drop(before, after, labels)[i] == lost
        cos = before[i] @ after[i] / before[i].norm() / after[i].norm()
        assert look.cosine_distance(before, after)[i].item() == pytest.approx(1 - cos.item(), abs=1e-6)


@pytest.mark.door
def test_doors():
    with pytest.raises(ValueError, match=r"share is 0\.7, must be above 0"):
        look.split_local_global_heads(torch.zeros(2, 2), share=0.7)
    with pytest.raises(ValueError, match=r"share is 1\.0, must lie between"):
        look.find_sinks(torch.zeros(3), share=1.0)
    with pytest.raises(ValueError, match="heads is 'sum'"):
        look.AttentionRollout(heads="sum")
    with pytest.raises(ValueError, match="kind is 'x', must be"):
        look.rhythm_credit(torch.zeros(3), torch.zeros(3), kind="x")
    with (
        pytest.raises(ValueError, match="heads are of 'nowhere'"),
        look.silenced(nn.Identity(), [("nowhere", 0)]),
    ):
        pass
