"""p-adapter: the whole graph by loops, for tokens among themselves and across, and what the power does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from heedful import authors
from heedful.mixers.heads.p_adapter import FFNAdapter, PAdapterAttention, PLaplacianAdapter
from heedful.ops.p_laplacian import p_laplacian

E = 1e-8


def build(**options):
    torch.manual_seed(0)
    options = {"dim": 12, "heads": 3, "reduction": 2, "samples": 4, "dropout": 0.0, "p": 1.6, **options}
    mixer = PAdapterAttention(**options).double()
    for q in mixer.parameters():
        if q.numel() > 1:
            nn.init.normal_(q, std=0.6)
    nn.init.constant_(mixer.output.adapter.theta, 0.3)
    return mixer, torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)


def literal(mixer, x, context=None, causal=False):
    """The card, one batch row and one head at a time, on the adjacency of all nodes."""
    out, adapter = mixer.output, mixer.output.adapter
    n, heads, d = x.shape[1], mixer.heads, mixer.dim // mixer.heads
    r = adapter.down.out_features // heads
    rows = []
    for b in range(x.shape[0]):
        source = x[b] if context is None else context[b]
        m = source.shape[0]
        qm, km, vm = mixer.query(x[b]), mixer.key(source), mixer.value(source)
        maps = []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            logits = qm[:, own] @ km[:, own].T / math.sqrt(d)
            if causal:
                logits = logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
            maps.append(logits.softmax(-1))
        y = out.dense(torch.cat([maps[h] @ vm[:, h * d : (h + 1) * d] for h in range(heads)], -1))
        if context is None:
            nodes = vm
        else:  # stretches of an adaptive pool
            k = mixer.samples
            cuts = [(i * m // k, -(-(i + 1) * m // k)) for i in range(k)]
            maps = [torch.stack([w[:, i:j].mean(-1) for i, j in cuts], -1) for w in maps]
            nodes = torch.cat([qm, torch.stack([vm[i:j].mean(0) for i, j in cuts])])
        projected = adapter.down(out.dense(nodes))
        mu = mixer.output.adapter.mu * 2 + mixer.output.adapter.mu * adapter.theta.tanh()
        messages = []
        for h in range(heads):
            z, size = projected[:, h * r : (h + 1) * r], len(nodes)
            if context is None:
                a0 = maps[h]
            else:
                a0 = torch.zeros(size, size, dtype=x.dtype)
                a0[:n, n:], a0[n:, :n] = maps[h], maps[h].T
            table = []
            for a in range(size):
                line = []
                for c in range(size):
                    step = (a0[a, c] + E).sqrt() * (z[c] - z[a] if a != c else 0.0 * z[a].detach()) + E
                    line.append(a0[a, c] * step.square().sum().sqrt() ** (adapter.p - 2))
                table.append(torch.cat(line))
            a1 = torch.stack(table)
            alpha = 1 / (a1.sum(-1) + 2 * mu / adapter.p)
            beta = alpha * 2 * mu / adapter.p
            walk, stay = torch.diag(alpha) @ a1, torch.diag(beta)
            if context is None:
                messages.append(walk @ z + stay @ z)
            else:
                assert not stay[:n, n:].any()
                messages.append(walk[:n, n:] @ z[n:] + stay[:n, n:] @ z[n:])
        gate = torch.nn.functional.gelu(adapter.gate(y))
        y = y + adapter.up(gate * torch.cat(messages, -1))
        rows.append(out.norm(y + x[b]))
    return torch.stack(rows)


@pytest.mark.parametrize(("causal", "crossing"), [(False, False), (True, False), (False, True)])
def test_equals_the_card(causal, crossing):
    mixer, x = build(causal=causal)
    context = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True) if crossing else None
    y, expected = mixer(x, context=context), literal(mixer, x, context, causal)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters(), *([context] if crossing else [])]
    grads = torch.autograd.grad((y * weight).sum(), leaves)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-9)  # (1e-8)^(p - 2) costs digits


def graph(n=4, m=6):
    torch.manual_seed(1)
    weights = torch.randn(2, 3, n, m, dtype=torch.float64).softmax(-1)
    return weights, *(torch.randn(2, 3, size, 5, dtype=torch.float64) for size in (n, m))


def test_p_of_two_is_a_walk_along_the_weights():
    weights, _, key = graph()
    query = key[:, :, -4:]
    out = p_laplacian(weights, query, key, p=2.0, mu=0.7, own=True)
    torch.testing.assert_close(out, (weights @ key + 0.7 * query) / 1.7)
    out = p_laplacian(weights, query, key, p=2.0, mu=0.7, own=False)
    torch.testing.assert_close(out, weights @ key / 1.7)


@pytest.mark.parametrize("p", [1.5, 2.5])
def test_among_themselves_shares_add_up_to_one(p):
    weights, _, key = graph()
    same = torch.ones_like(key) * 3.0
    for zero in (False, True):
        out = p_laplacian(weights, same[:, :, -4:], same, p=p, mu=0.7, own=True, zero_diagonal=zero)
        torch.testing.assert_close(out, same[:, :, -4:])


def test_the_diagonal_rules_for_small_p_unless_it_is_taken_out():
    weights, _, key = graph(6, 6)
    rest = weights.masked_fill(torch.eye(6, dtype=torch.bool), 0.0)
    share = p_laplacian(weights, key, key, p=1.2, mu=0.1, own=True)
    assert (share - key).abs().max() < 1e-3  # a weight of (1e-8)^(-0.8)
    out = p_laplacian(weights, key, key, p=1.2, mu=0.1, own=True, zero_diagonal=True)
    torch.testing.assert_close(out, p_laplacian(rest, key, key, p=1.2, mu=0.1, own=True))
    assert (out - key).abs().max() > 0.1


def test_order_of_the_keys_does_not_matter():
    weights, query, key = graph()
    order = torch.randperm(6)
    out = p_laplacian(weights, query, key, p=1.5, mu=0.3, own=False)
    moved = p_laplacian(weights[..., order], query, key[:, :, order], p=1.5, mu=0.3, own=False)
    torch.testing.assert_close(moved, out)


def test_mu_stays_between_once_and_three_times_its_start():
    weights, _, key = graph()
    for theta, factor in ((-50.0, 1.0), (0.0, 2.0), (50.0, 3.0)):
        adapter = PLaplacianAdapter(30, heads=3, reduction=2, mu=0.4, p=2.0).double()
        nn.init.constant_(adapter.theta, theta)
        x = torch.randn(2, 4, 30, dtype=torch.float64)
        messages = (weights @ key + factor * 0.4 * key[:, :, -4:]) / (1 + factor * 0.4)
        gate = torch.nn.functional.gelu(adapter.gate(x))
        expected = x + adapter.up(gate * messages.transpose(1, 2).flatten(2))
        torch.testing.assert_close(adapter(x, weights, key[:, :, -4:], key, own=True), expected)


def test_adapter_parameters_at_768_channels():
    count = sum(q.numel() for q in PLaplacianAdapter(768, heads=12, device="meta").parameters())
    assert count == 222_146
    fixed = PLaplacianAdapter(768, heads=12, learnable_p=False, device="meta")
    assert sum(q.numel() for q in fixed.parameters()) == 222_145


def test_a_block_of_the_released_decoder_loads():
    mixer, _ = build()
    names = {
        **{f"self.{part}": part for part in ("query", "key", "value")},
        "output.dense": "output.dense",
        "output.LayerNorm": "output.norm",
        "output.text_laplacian_adapter_i": "output.adapter.down",
        "output.text_laplacian_adapter_gate": "output.adapter.gate",
        "output.text_laplacian_adapter_o": "output.adapter.up",
    }
    ours = mixer.state_dict()
    theirs = {f"{a}.{k}": ours[f"{b}.{k}"] for a, b in names.items() for k in ("weight", "bias")}
    theirs["output.laplacian_adapter_p"] = ours["output.adapter.p"]
    theirs["output.laplacian_adapter_mu"] = ours["output.adapter.theta"]
    other = authors.load(PAdapterAttention(12, heads=3, reduction=2, samples=4).double().eval(), theirs)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(other(x), mixer(x))


def test_the_adapter_beside_the_net():
    adapter = FFNAdapter(12, reduction=3).double()
    names = {"0.weight": "down.weight", "0.bias": "down.bias", "2.weight": "up.weight", "2.bias": "up.bias"}
    theirs = {a: torch.randn_like(adapter.state_dict()[b]) for a, b in names.items()}
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    inner = (x @ theirs["0.weight"].T + theirs["0.bias"]).relu()
    expected = x + inner @ theirs["2.weight"].T + theirs["2.bias"]
    torch.testing.assert_close(authors.load(adapter, theirs)(x), expected)
    with pytest.raises(ValueError, match="reduction is 5, must divide dim, which is 12"):
        FFNAdapter(12, reduction=5)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="reduction is 5, must divide dim, which is 16"):
        PAdapterAttention(16, heads=4, reduction=5)
    with pytest.raises(ValueError, match="heads is 8, must divide dim / reduction, which is 4"):
        PAdapterAttention(16, heads=8, reduction=4)
    with pytest.raises(ValueError, match="p is 0"):
        PAdapterAttention(16, heads=2, p=0)
    with pytest.raises(ValueError, match="samples is 0"):
        PAdapterAttention(16, heads=2, samples=0)
    mixer = PAdapterAttention(16, heads=2, causal=True)
    x = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="state is given, must be None with a context"):
        mixer(x, context=x, state=mixer.init_state(1))
