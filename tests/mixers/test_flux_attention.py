"""Flux attention: the router by hand, its decision, both branches by loops, training and decoding."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.flux_attention import FluxAttention
from heedful.patterns.local_blocks import LocalBlocks
from heedful.routing.layer_router import (
    LayerRouter,
    SparsityTarget,
    pool_ends,
    router_temperature,
    streaming_blocks,
)

F64 = torch.float64


def build(**options):
    torch.manual_seed(3)
    mixer = FluxAttention(
        **{"dim": 8, "heads": 2, "kv_heads": 1, "block_size": 2, "local_blocks": 2, "pool": 2, **options},
        dtype=F64,
    )
    for parameter in mixer.router.parameters():
        torch.nn.init.normal_(parameter, std=0.7 if parameter.ndim > 1 else 0.0)
    return mixer


def turned(x, position):
    d = x.shape[-1]
    angle = position * 10000.0 ** (-torch.arange(0, d, 2, dtype=F64) / d)
    u, v = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()], -1)


def router_logits(router, p):
    def linear(layer, x):
        return layer.weight @ x + layer.bias

    def silu(x):
        return x / (1 + (-x).exp())

    f = linear(router.features[2], silu(linear(router.features[0], p)))
    return linear(router.head[4], silu(linear(router.head[2], silu(linear(router.head[0], f)))))


def transcription(mixer, x, paper=False, z=None):
    """One sequence (n, c). z: the decision; None: the router's argmax."""
    n = len(x)
    d, block = mixer.head_dim, 2
    share = mixer.heads // mixer.kv_heads
    q, k, v = ((layer.weight @ x.T).T.view(n, -1, d) for layer in (mixer.query, mixer.key, mixer.value))
    same = n if paper else 6  # (1 sink block + 2 local) * 2
    ends = [*range(min(2, n)), *range(max(0, same - 2), same)]
    if z is None and n >= same:
        p = sum(q[t, h] for t in ends for h in range(mixer.heads)) / (len(ends) * mixer.heads)
        z = float(router_logits(mixer.router, p).argmax())
    rows = []
    for t in range(n):
        heads = []
        for h in range(mixer.heads):
            results = []
            for sparse in (False, True):
                seen = [
                    j for j in range(t + 1) if not sparse or j < block or 0 <= t // block - j // block <= 1
                ]
                keys = torch.stack([turned(k[j, h // share], j) for j in seen])
                weight = (keys @ turned(q[t, h], t) / math.sqrt(d)).softmax(0)
                results.append(weight @ v[seen, h // share])
            heads.append(results[0] if t < 6 else z * results[0] + (1 - z) * results[1])
        rows.append(mixer.out.weight @ torch.cat(heads) + mixer.out.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("selection", ["strict", "paper"])
def test_equals_transcription(selection):
    mixer = build(selection=selection).eval()
    x = 2 * torch.randn(6, 15, 8, dtype=F64, requires_grad=True)
    y = mixer(x)
    expected = torch.stack([transcription(mixer, row, selection == "paper") for row in x])
    torch.testing.assert_close(y, expected)
    decided = torch.stack([transcription(mixer, row, z=0.0) for row in x.detach()])
    sparse = (y.detach() - decided).abs().amax((1, 2)) < 1e-9
    assert 0 < sparse.sum() < 6  # the rows of this batch decide differently
    weight = torch.randn_like(y)
    leaves = [x, mixer.query.weight, mixer.key.weight, mixer.value.weight, mixer.out.weight]
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )
    router = torch.autograd.grad((y * weight).sum(), list(mixer.router.parameters()), allow_unused=True)
    assert all(g is None for g in router)


def test_training_draws_and_passes_the_gradient_of_the_soft_decision():
    mixer = build().train()
    x = torch.randn(1, 11, 8, dtype=F64)
    for seed in range(6):
        torch.manual_seed(seed)
        y = mixer(x)
        z = mixer.aux_losses["full_share"].item()
        assert z == pytest.approx(round(z), abs=1e-12)
        torch.testing.assert_close(y, transcription(mixer, x[0], z=round(z))[None])
        # d y / d parameter = (full - sparse) d soft / d parameter
        weight = torch.randn_like(y)
        parameters = list(mixer.router.parameters())
        found = torch.autograd.grad((y * weight).sum(), parameters)
        full, sparse = (transcription(mixer, x[0], z=float(value)) for value in (1, 0))
        slope = ((full - sparse) * weight[0]).sum().detach()
        torch.manual_seed(seed)
        u = torch.rand(1, 2, dtype=F64)
        noise = -(-(u + 1e-8).log() + 1e-8).log()
        q = (mixer.query.weight @ x[0].T).T.view(11, 2, 4).detach()
        p = (q[0] + q[1] + q[4] + q[5]).mean(0) / 4
        soft = ((router_logits(mixer.router, p) + noise[0]) / 1.5).softmax(0)[1]
        wanted = torch.autograd.grad(slope * soft, parameters)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("selection", ["strict", "paper"])
def test_pieces(selection):
    mixer = build(selection=selection).eval()
    x, mask = 2 * torch.randn(4, 19, 8, dtype=F64), torch.rand(4, 19) < 0.8
    mask[:, -4:] = True
    whole = torch.stack([transcription(mixer, row) for row in x])
    if selection == "paper":
        # The decision of the prompt is kept.
        y, state = mixer(x[:, :12], state=mixer.init_state(4))
        torch.testing.assert_close(y, mixer(x[:, :12]))
        more = [mixer(x[:, :12])]
        for t in range(12, 19):
            y, state = mixer(x[:, t : t + 1], state=state)
            more.append(y)
        z = mixer.router.decide(state.pooled)
        wanted = torch.stack([transcription(mixer, row, z=float(d)) for row, d in zip(x, z, strict=True)])
        torch.testing.assert_close(torch.cat(more, 1), wanted)
        return
    for cuts in ((1,) * 19, (5, 1, 0, 13), (6, 13), (19,)):
        for seen in (None, mask):
            state, parts, place = mixer.init_state(4), [], 0
            for piece in x.split(cuts, 1):
                part = None if seen is None else seen[:, place : place + piece.shape[1]]
                y, state = mixer(piece, mask=part, state=state)
                parts.append(y)
                place += piece.shape[1]
            y = torch.cat(parts, 1)
            if seen is None:
                torch.testing.assert_close(y, whole)
            else:
                for b in range(4):
                    at = seen[b].nonzero()[:, 0]
                    torch.testing.assert_close(y[b, at], mixer(x[b : b + 1, at], positions=at)[0])


def test_begins_as_the_frozen_layer():
    layer = SelfAttention(16, heads=4, kv_heads=2, causal=True, rotary=True)
    x = torch.randn(2, 40, 16)
    expected = layer(x)
    mixer = FluxAttention.around(layer, block_size=4, local_blocks=2, pool=3).eval()
    torch.testing.assert_close(mixer(x), expected)
    trained = [n for n, p in mixer.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.startswith("router.") for n in trained)
    assert mixer.query.weight is layer.query.weight


def test_sparse_branch_is_exact_while_it_sees_all():
    mixer = build(block_size=4, local_blocks=3).eval()
    with torch.no_grad():
        mixer.router.head[-1].weight.zero_()
        mixer.router.head[-1].bias.copy_(torch.tensor([4.0, 0.0]))  # sparse
    dense = SelfAttention(8, heads=2, kv_heads=1, causal=True, rotary=True, qkv_bias=False, dtype=F64)
    dense.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("router")})
    x = torch.randn(1, 20, 8, dtype=F64)
    torch.testing.assert_close(mixer(x)[:, :16], dense(x)[:, :16])
    assert (mixer(x)[:, 16:] - dense(x)[:, 16:]).abs().max() > 1e-3


def test_router():
    assert sum(p.numel() for p in LayerRouter(128).parameters()) == 592_002
    router = LayerRouter(6).eval()
    assert (router.decide(torch.randn(5, 6)) == 1).all()
    torch.testing.assert_close(router(torch.randn(2, 6)), torch.tensor([[0.0, 4.5]]).expand(2, 2))
    query = torch.randn(2, 3, 20, 4, dtype=F64)
    other = query.clone()
    other[:, :, 5:15] = torch.randn(2, 3, 10, 4, dtype=F64)
    torch.testing.assert_close(pool_ends(query, 5), pool_ends(other, 5))
    ends = torch.cat([query[:, :, :5], query[:, :, 15:]], 2)
    torch.testing.assert_close(pool_ends(query, 5), ends.mean((1, 2)))
    short = query[:, :, :7]
    twice = torch.cat([short[:, :, :5], short[:, :, 2:]], 2)
    torch.testing.assert_close(pool_ends(short, 5), twice.mean((1, 2)))
    torch.testing.assert_close(pool_ends(short, 50), short.mean((1, 2)))


def test_schedule_and_target():
    assert router_temperature(0, 300) == 1.5
    assert router_temperature(90, 300) == pytest.approx(1.25)
    assert router_temperature(180, 300) == router_temperature(300, 300) == 1.0
    target = SparsityTarget()
    z = [torch.tensor(v, requires_grad=True) for v in (1.0, 1.0, 0.0)]
    loss = target(z, task=1)  # a third is sparse, 0.45 wanted
    a, c = target.linear[1].item(), target.quadratic[1].item()
    away = 1 / 3 - 0.45
    assert loss.item() == pytest.approx(a * abs(away) + c * away**2, rel=1e-5)
    loss.backward()
    assert z[0].grad.item() == pytest.approx((a + 2 * c * abs(away)) / 3, rel=1e-4)
    assert target.linear.grad[1].item() == pytest.approx(-abs(away), rel=1e-5)
    assert target.quadratic.grad[1].item() == pytest.approx(-(away**2), rel=1e-5)


def test_local_blocks():
    pattern = LocalBlocks(3, 1)
    q, k = torch.arange(14)[:, None], torch.arange(14)
    expected = (q // 3 - k // 3 == 0) | (q // 3 - k // 3 == 1)
    assert torch.equal(pattern.mask(14)[0, 0], expected)
    for size in ((1, 1), (2, 3), (5, 4)):
        assert torch.equal(pattern.block_table(14, block_size=size).dense()[0, 0], expected)
    seen = streaming_blocks(3, 1, 2).mask(14)[0, 0]
    assert torch.equal(seen, (expected | (k < 3)) & (k <= q))


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="selection is 'all', must be one of"):
        FluxAttention(16, selection="all")
    with pytest.raises(ValueError, match="must see Causal"):
        FluxAttention.around(SelfAttention(16, heads=4))
