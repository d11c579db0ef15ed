"""Routing Transformer: the strict and the published form by loops, the centroids' steps, the port."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from heedful.mixers.sparse.kmeans_attention import KmeansAttention
from heedful.mixers.sparse.routing_transformer import RoutingTransformerAttention

F64 = torch.float64


def build(seed=0, **given):
    torch.manual_seed(seed)
    sizes = {"heads": 3, "local_heads": 1, "clusters": 3, "window": 4, "local_block": 3}
    return RoutingTransformerAttention(12, **{**sizes, "dtype": F64, **given})


def norm(x):
    x = x - x.mean()
    return x / (x.square().mean() + 1e-6).sqrt()


def transcription(mixer, x, *, causal=True, rank_causal=False):
    """The card's steps 1 to 10, one head and one query at a time; outputs and the auxiliary loss."""
    batch, n = x.shape[:2]
    H, d, routed = mixer.heads, mixer.head_dim, mixer.routed_heads
    W, B = mixer.window, mixer.local_block
    rows, distances = [], []
    for b in range(batch):
        heads = []
        for h in range(H):
            own = slice(h * d, (h + 1) * d)
            q = (x[b] @ mixer.query.weight.T)[:, own] * d**-0.5
            if mixer.shared_qk and h >= routed:
                k = x[b] @ mixer.key.weight.T[:, (h - routed) * d : (h - routed + 1) * d]
            else:
                k = q if mixer.shared_qk else (x[b] @ mixer.key.weight.T)[:, own]
            v = (x[b] @ mixer.value.weight.T)[:, own]
            out = [torch.zeros(d, dtype=F64)] * n
            if h < routed:
                q = torch.stack([norm(t) for t in q])
                k = torch.stack([norm(t) for t in k])
                mu = mixer.means[h]
                near_q = [int((t @ mu.T).argmax()) for t in q]
                near_k = [int((t @ mu.T).argmax()) for t in k]
                distances.append(
                    sum((t - mu[c]).square().mean() for t, c in zip(q, near_q, strict=True))
                    + sum((t - mu[c]).square().mean() for t, c in zip(k, near_k, strict=True))
                )
                if mixer.selection == "strict":
                    for i in range(n):
                        seen = (k[: i + 1] @ mu[near_q[i]]).argsort(descending=True)[:W].tolist()
                        out[i] = torch.stack([q[i] @ k[j] for j in seen]).softmax(0) @ v[seen]
                else:
                    count = [0] * n
                    for c in range(mixer.clusters):
                        queries = sorted((q @ mu[c]).argsort(descending=True)[:W].tolist())
                        keys = sorted((k @ mu[c]).argsort(descending=True)[:W].tolist())
                        for r, i in enumerate(queries):
                            count[i] += 1
                            seen = keys
                            if causal:
                                seen = keys[: r + 1] if rank_causal else [j for j in keys if j <= i]
                            if seen:
                                o = torch.stack([q[i] @ k[j] for j in seen]).softmax(0) @ v[seen]
                                out[i] = out[i] + o
                    out = [o / (c + 1e-2) for o, c in zip(out, count, strict=True)]
            else:
                for i in range(n):
                    block = i // B
                    last = i + 1 if causal else min(n, (block + 2) * B)
                    seen = list(range(max(0, (block - 1) * B), last))
                    out[i] = torch.stack([q[i] @ k[j] for j in seen]).softmax(0) @ v[seen]
            heads.append(torch.stack(out) @ mixer.talk.weight.T)
        rows.append(torch.cat(heads, 1) @ mixer.out.weight.T)
    loss = mixer.beta * sum(distances) / (batch * routed * n)
    return torch.stack(rows), loss


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ({}, {}),
        ({"shared_qk": True}, {}),
        ({"local_heads": 0, "window": 30, "shared_qk": True}, {}),
        ({"selection": "paper"}, {}),
        ({"selection": "paper", "rank_causal": True}, {"rank_causal": True}),
        ({"selection": "paper", "rank_causal": True, "shared_qk": True}, {"rank_causal": True}),
        ({"causal": False}, {"causal": False}),
    ],
)
def test_equals_transcription(given, how):
    mixer = build(**given).eval()
    x = torch.randn(2, 19, 12, dtype=F64, requires_grad=True)
    y, (expected, loss) = mixer(x), transcription(mixer, x, **how)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mixer.aux_losses["clusters"], loss)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    ours = torch.autograd.grad((y * weight).sum() + 100 * mixer.aux_losses["clusters"], leaves)
    theirs = torch.autograd.grad((expected * weight).sum() + 100 * loss, leaves)
    torch.testing.assert_close(ours, theirs)


def test_rank_and_position_masks_agree_where_queries_are_keys():
    by_rank = build(selection="paper", shared_qk=True, rank_causal=True)
    by_position = build(selection="paper", shared_qk=True)
    x = torch.randn(2, 23, 12, dtype=F64)
    mask = torch.rand(2, 23) < 0.7
    torch.testing.assert_close(by_rank(x), by_position(x))
    torch.testing.assert_close(by_rank(x, mask=mask)[mask], by_position(x, mask=mask)[mask])


def test_one_cluster_of_all_tokens_is_softmax_attention():
    mixer = build(selection="paper", local_heads=0, clusters=1, window=16, rank_causal=True)
    x = torch.randn(2, 16, 12, dtype=F64)
    q, k, v = mixer.project(x)
    weights = (q @ k.mT).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    heads = weights @ v / 1.01
    expected = mixer.out(mixer.talk(heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x), expected)


def test_padding_takes_no_place_in_a_cluster():
    for given in ({}, {"selection": "paper"}, {"causal": False}):
        mixer = build(**given).eval()
        x = torch.randn(1, 20, 12, dtype=F64)
        mask = torch.arange(20)[None] < 13
        torch.testing.assert_close(mixer(x, mask=mask)[:, :13], mixer(x[:, :13]))
        short = mixer.aux_losses["clusters"]
        mixer(x, mask=mask)
        torch.testing.assert_close(mixer.aux_losses["clusters"], short)


# -- centroids -----------------------------------------------------------------------------------------


def step_by_hand(mixer, x, mask):
    """Step 5 of the card: queries first, then keys, both of the clusters before the step."""
    q, k, _ = (t.detach() for t in mixer.project(x))
    count, sums, mu = mixer.ema_count.clone(), mixer.ema_means.clone(), mixer.means.clone()
    before = mu.clone()
    for tokens in (q, k):
        for h in range(mixer.routed_heads):
            size, total = torch.zeros(mixer.clusters, dtype=F64), torch.zeros_like(mu[h])
            for b, i in mask.nonzero().tolist():
                c = int((tokens[b, h, i] @ before[h].T).argmax())
                size[c] += 1
                total[c] += tokens[b, h, i]
            count[h] = 0.99 * count[h] + 0.01 * size
            sums[h] = 0.99 * sums[h] + 0.01 * total
            n = count[h].sum()
            smooth = (count[h] + 1e-5) / (n + mixer.clusters * 1e-5) * n
            mu[h] = sums[h] / smooth[:, None]
    return count, sums, mu


@pytest.mark.parametrize("masked", [False, True])
def test_a_backward_pass_in_training_moves_the_centroids(masked):
    mixer = build()
    x = torch.randn(2, 19, 12, dtype=F64)
    mask = torch.rand(2, 19) < 0.6 if masked else torch.ones(2, 19, dtype=torch.bool)
    start = mixer.means.clone()
    expected = step_by_hand(mixer, x, mask)
    y = mixer(x, mask=mask if masked else None)
    assert torch.equal(mixer.means, start)  # a forward changes nothing
    y.sum().backward()
    assert not torch.equal(mixer.means, start)
    torch.testing.assert_close((mixer.ema_count, mixer.ema_means, mixer.means), expected)


def test_centroids_stay_in_eval_and_where_nothing_is_trained():
    mixer = build()
    x = torch.randn(2, 19, 12, dtype=F64, requires_grad=True)
    start = mixer.means.clone()
    mixer.eval()
    mixer(x).sum().backward()
    mixer.train()
    with torch.no_grad():
        mixer(x)
    assert torch.equal(mixer.means, start)


def test_a_recomputed_forward_moves_the_centroids_once():
    plain, again = build(), build()
    x = torch.randn(2, 19, 12, dtype=F64, requires_grad=True)
    plain(x).square().sum().backward()
    checkpoint(again, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(again.means, plain.means)
    torch.testing.assert_close(again.query.weight.grad, plain.query.weight.grad)


def test_centroids_converge_to_the_means_of_what_they_take():
    mixer = build(local_heads=0, heads=1, clusters=4, decay=0.9)
    with torch.no_grad():
        mixer.key.weight.copy_(mixer.query.weight)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(1, 5, 12, dtype=F64, generator=generator).repeat(1, 8, 1)
    x = x + 0.05 * torch.randn(1, 40, 12, dtype=F64, generator=generator)
    losses = []
    for _ in range(60):
        mixer(x).sum().backward()
        losses.append(float(mixer.aux_losses["clusters"].detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_centroids_as_parameters_follow_the_loss():
    mixer = build(ema=False)
    x = torch.randn(2, 19, 12, dtype=F64)
    mixer(x)
    (grad,) = torch.autograd.grad(mixer.aux_losses["clusters"], mixer.means)
    q, k, _ = (t.detach() for t in mixer.project(x))
    expected = torch.zeros_like(grad)
    total = 2 * mixer.routed_heads * 19 * mixer.head_dim
    for tokens in (q, k):
        for b in range(2):
            for h in range(mixer.routed_heads):
                for t in tokens[b, h]:
                    c = int((t @ mixer.means[h].T).argmax())
                    expected[h, c] += 2 * (mixer.means[h, c].detach() - t) / total
    torch.testing.assert_close(grad, expected)


def test_a_state_keeps_how_near_its_keys_are():
    mixer = build().eval()
    x = torch.randn(2, 19, 12, dtype=F64)
    _, state = mixer(x[:, :12], state=mixer.init_state(2))
    assert state.score.shape == (2, 2, 3, 12)
    y, state = mixer(x[:, 12:], state=state)
    torch.testing.assert_close(y, mixer(x)[:, 12:])


def test_parameter_counts():
    # Four projections of dim 64 and one 8 x 8 matrix for all heads; centroids are buffers.
    mixer = RoutingTransformerAttention(64)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * 64**2 + 8**2
    assert mixer.means.shape == (4, 16, 8)
    torch.testing.assert_close(mixer.means.square().sum(-1), torch.full((4, 16), 8.0), rtol=1e-4, atol=0)
    shared = RoutingTransformerAttention(64, shared_qk=True, local_heads=2)
    assert sum(p.numel() for p in shared.parameters()) == 3 * 64**2 + 64 * 16 + 8**2


# -- the port ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_port_equals_loops(shared, causal):
    torch.manual_seed(3)
    port = KmeansAttention(
        heads=2, head_dim=4, clusters=3, window=5, causal=causal, shared_qk=shared, memories=int(not shared),
        dtype=F64,
    )  # fmt: skip
    q, k, v = (torch.randn(2, 2, 13, 4, dtype=F64, requires_grad=True) for _ in range(3))
    k = q if shared else k
    y = port(q, k, v)
    rows, used = [], (q, v, port.memory_key, port.memory_value) if not shared else (q, v)
    for b in range(2):
        for h in range(2):
            unit_q, unit_k = (t[b, h] / t[b, h].norm(dim=-1, keepdim=True) for t in (q, k))
            total, count = [torch.zeros(4, dtype=F64)] * 13, [0] * 13
            for c in range(3):
                queries = (unit_q @ port.means[h, c]).argsort(descending=True)[:5].tolist()
                keys = (unit_k @ port.means[h, c]).argsort(descending=True)[:5].tolist()
                for i in queries:
                    seen = [j for j in keys if j <= i or not causal]
                    if shared:
                        seen = [j for j in seen if j != i] or [i]
                    ks = torch.cat([port.memory_key[h, c], (unit_k if shared else k[b, h])[seen]])
                    vs = torch.cat([port.memory_value[h, c], v[b, h, seen]])
                    total[i] = total[i] + (ks @ q[b, h, i] / 2).softmax(0) @ vs
                    count[i] += 1
            rows.append(torch.stack([t / (c + 1e-5) for t, c in zip(total, count, strict=True)]))
    expected = torch.stack(rows).view(2, 2, 13, 4)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), used)
    theirs = torch.autograd.grad((expected * weight).sum(), used)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="local_heads is 3"):
        build(local_heads=3)
    with pytest.raises(ValueError, match="selection is 'strict'"):
        build(causal=False, selection="strict")
    with pytest.raises(ValueError, match="selection is 'best'"):
        build(selection="best")
    with pytest.raises(ValueError, match="rank_causal is True"):
        build(rank_causal=True)
    with pytest.raises(ValueError, match="decay is 1"):
        build(decay=1)
    with pytest.raises(ValueError, match="selection is 'paper'"):
        build(selection="paper").init_state(1)
    with pytest.raises(ValueError, match="causal is False"):
        build(causal=False).init_state(1)
    with pytest.raises(ValueError, match="memories is 0"):
        KmeansAttention(heads=1, head_dim=2, clusters=2, window=2, causal=True, memories=0)
