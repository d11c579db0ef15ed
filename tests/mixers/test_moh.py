"""Mixture-of-head attention: gate and all four forms in loops, plain attention as a special case."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from heedful.mixers.heads.moh import MixtureOfHeadAttention
from heedful.mixers.heads.moh_llama import MixtureOfHeadLlamaAttention
from heedful.mixers.heads.moh_vit import MixtureOfHeadAggregatedAttention, MixtureOfHeadVisionAttention
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.routing.head_gate import HeadGate, load_balance


def assert_same_with_gradients(mixer, x, ours, expected):
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )


def softmax(z):
    weight = [zi.exp() for zi in z]
    return [w / sum(weight) for w in weight]


def literal_gate(gate, token, heads):
    """The gates of one token, number by number."""
    s, k, r = gate.shared, gate.routed, heads - gate.shared
    shared = [s * p for p in (softmax(token @ gate.share.weight.T) if s > 1 else [torch.ones(())] * s)]
    if k == 0:
        return shared
    p = softmax(token @ gate.route.weight.T) if r > 1 else [torch.ones(())]
    best = sorted(range(r), key=lambda i: -p[i])[:k]
    total = sum(p[i] for i in best)
    routed = [k * p[i] / total if i in best else 0 * p[i] for i in range(r)]
    if s == 0:
        return routed
    w = softmax(token @ gate.balance.weight.T)
    return [2 * w[0] * g for g in shared] + [2 * w[1] * g for g in routed]


SHARES = [(2, 2), (1, 3), (0, 2), (5, 0), (4, 1)]


@pytest.mark.parametrize(("shared", "routed"), SHARES)
def test_gate_equals_the_card(shared, routed):
    gate = HeadGate(7, heads=5, shared=shared, routed=routed, dtype=torch.float64)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    ours, _ = gate(x)
    expected = [torch.stack(literal_gate(gate, token, 5)) for token in x.flatten(0, 1)]
    torch.testing.assert_close(ours.flatten(0, 1), torch.stack(expected))
    if shared and routed:  # the sums of the two kinds
        w = (x @ gate.balance.weight.T).softmax(-1)
        torch.testing.assert_close(ours[..., :shared].sum(-1), 2 * shared * w[..., 0])
        torch.testing.assert_close(ours[..., shared:].sum(-1), 2 * routed * w[..., 1])


@pytest.mark.parametrize(("shared", "routed"), SHARES)
def test_parameters_of_the_gate(shared, routed):
    gate = HeadGate(7, heads=5, shared=shared, routed=routed)
    candidates = 5 - shared
    rows = sum(n for n in (candidates, shared) if n > 1) + (2 if shared and routed else 0)
    assert sum(p.numel() for p in gate.parameters()) == 7 * rows


def test_load_balance():
    """R^2 mean_r(share of r * probability of r), over the tokens that are no padding."""
    p = torch.rand(2, 5, 3, dtype=torch.float64).softmax(-1)
    taken = torch.rand(2, 5, 3) < 0.5
    mask = torch.tensor([[True] * 5, [True, True, False, False, True]])
    tokens = [(p[b, i], taken[b, i]) for b in range(2) for i in range(5) if mask[b, i]]
    expected = sum(
        sum(float(m[r]) for _, m in tokens) / 8 * sum(q[r] for q, _ in tokens) / 8 for r in range(3)
    )
    torch.testing.assert_close(load_balance(p, taken, mask), expected / 3 * 9)
    even = torch.full((1, 3, 3), 1 / 3), torch.eye(3, dtype=torch.bool)[None]
    torch.testing.assert_close(load_balance(*even), torch.tensor(1.0))


def literal_heads(query, key, value, causal):
    """Softmax attention of one row; query (h, n, d)."""
    n, m = query.shape[1], key.shape[1]
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if causal:
        logits = logits.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1) @ value


@pytest.mark.parametrize(("shared", "routed", "causal", "norm"), [(2, 2, True, False), (0, 3, False, True)])
def test_dit_form_equals_the_card(shared, routed, causal, norm):
    mixer = MixtureOfHeadAttention(
        10,
        heads=6,
        shared_heads=shared,
        routed_heads=routed,
        head_dim=3,
        qk_norm=norm,
        causal=causal,
        dtype=torch.float64,
    )
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    rows = []
    for row in x:
        q, k, v = ((row @ m.weight.T + m.bias).view(5, 6, 3).transpose(0, 1) for m in
                   (mixer.query, mixer.key, mixer.value))  # fmt: skip
        if norm:
            q, k = (
                (z - z.mean(-1, True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * m.weight
                + m.bias
                for z, m in ((q, mixer.query_norm), (k, mixer.key_norm))
            )
        o = literal_heads(q, k, v, causal)
        g = torch.stack([torch.stack(literal_gate(mixer.gate, token, 6)) for token in row])
        gated = torch.cat([o[h] * g[:, h, None] for h in range(6)], -1)
        rows.append(gated @ mixer.out.weight.T + mixer.out.bias)
    assert_same_with_gradients(mixer, x, mixer(x), torch.stack(rows))


def test_even_weights_and_all_heads_are_plain_attention():
    mixer = MixtureOfHeadAttention(12, heads=6, shared_heads=2, routed_heads=4, causal=True)
    plain = SelfAttention(12, heads=6, causal=True)
    plain.load_state_dict({n: p for n, p in mixer.state_dict().items() if "gate" not in n})
    for linear in (mixer.gate.route, mixer.gate.share, mixer.gate.balance):
        torch.nn.init.zeros_(linear.weight)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(mixer(x), plain(x))


def test_losses_stand_on_the_module_in_training_alone():
    x = torch.randn(2, 7, 12)
    for mixer in (MixtureOfHeadAttention(12, heads=6), MixtureOfHeadLlamaAttention(12, heads=6)):
        mixer(x)
        loss = mixer.aux_losses["load_balance"]
        router = mixer.query if isinstance(mixer, MixtureOfHeadLlamaAttention) else mixer.gate.route
        (grad,) = torch.autograd.grad(loss, router.weight)
        assert grad.abs().sum() > 0
        mixer.eval()(x)
        assert mixer.aux_losses == {}


def test_load_balance_of_the_parameter_free_form():
    mixer = MixtureOfHeadLlamaAttention(16, heads=8, kv_heads=2, dtype=torch.float64)
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    mixer(x)
    used, mean = torch.zeros(4), torch.zeros(4, dtype=torch.float64)
    for token in x[0]:
        q = mixer.query.weight @ token
        length = torch.stack([q[2 * h : 2 * h + 2].square().sum().sqrt() for h in range(4, 8)])
        deviation = ((length - length.mean()).square().sum() / 3).sqrt()
        p = torch.stack(softmax(length / deviation))
        mean += p / 4
        for best in sorted(range(4), key=lambda i: -length[i])[:2]:
            used[best] += 1 / 4
    torch.testing.assert_close(mixer.aux_losses["load_balance"], 0.01 * 4 * (used * mean).sum())


def turned(z):
    n, d = z.shape[-2:]
    angle = torch.arange(n, dtype=z.dtype)[:, None] * 1e4 ** (-torch.arange(0, d, 2, dtype=z.dtype) / d)
    u, v = z[..., : d // 2], z[..., d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


def test_llama_form_equals_the_card():
    mixer = MixtureOfHeadLlamaAttention(
        10, heads=6, kv_heads=2, head_dim=4, shared_heads=1, routed_heads=2, dtype=torch.float64
    )
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    rows = []
    for row in x:
        q = (row @ mixer.query.weight.T).view(5, 6, 4).transpose(0, 1)
        k, v = ((row @ m.weight.T).view(5, 2, 4).transpose(0, 1).repeat_interleave(3, 0) for m in
                (mixer.key, mixer.value))  # fmt: skip
        o = literal_heads(turned(q), turned(k), v, True)
        tokens = []
        for t in range(5):
            order = sorted(range(1, 6), key=lambda h: -q[h, t].square().sum())
            on = {0, *order[:2]}
            tokens.append(torch.cat([o[h, t] if h in on else 0 * o[h, t] for h in range(6)]))
        rows.append(torch.stack(tokens) @ mixer.out.weight.T)
    assert_same_with_gradients(mixer, x, mixer(x), torch.stack(rows))


def test_llama_form_with_all_heads_is_grouped_query_attention():
    mixer = MixtureOfHeadLlamaAttention(16, heads=8, kv_heads=2, shared_heads=4, routed_heads=4)
    plain = SelfAttention(16, heads=8, kv_heads=2, causal=True, rotary=True, qkv_bias=False)
    plain.load_state_dict({**mixer.state_dict(), "out.bias": torch.zeros(16)})
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(mixer(x), plain(x))
    assert sum(p.numel() for p in mixer.parameters()) == 2 * 16 * 16 + 2 * 16 * 4


@pytest.mark.parametrize("cls", [MixtureOfHeadAttention, MixtureOfHeadLlamaAttention])
def test_keys_and_values_of_all_heads_are_kept(cls):
    mixer = cls(16, heads=4, **({"causal": True} if cls is MixtureOfHeadAttention else {"kv_heads": 2}))
    _, state = mixer(torch.randn(3, 5, 16), state=mixer.init_state(3))
    kept = 4 if cls is MixtureOfHeadAttention else 2
    assert state.nbytes() == 3 * 5 * 2 * kept * 4 * 4  # batch, tokens, k and v, heads, width, bytes


# The forms on maps.


def unit(z):
    return z / z.square().sum(-1, keepdim=True).sqrt()


def log_offset(t):
    return math.copysign(math.log2(abs(t) + 1) / math.log2(8), t)


def literal_position(mixer, place, cell, size, span):
    """The bias of each head for the offset of a place and the mean of the places of a cell."""
    offset = []
    for axis in (0, 1):
        start = cell[axis] * span[axis]
        centre = sum(range(start, start + span[axis])) / span[axis]
        offset.append(log_offset((place[axis] - centre) / (size[axis] - 1) * 8))
    hidden = F.relu(
        mixer.position_in.weight @ mixer.query_embedding.new_tensor(offset) + mixer.position_in.bias
    )
    return mixer.position_out.weight @ hidden + mixer.position_out.bias


def test_global_form_on_maps_equals_the_card():
    mixer = MixtureOfHeadVisionAttention(12, heads=4, shared_heads=1, routed_heads=2, dtype=torch.float64)
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 12, 3, 4, dtype=torch.float64, requires_grad=True)
    places = [(i, j) for i in range(3) for j in range(4)]
    rows = []
    for row in x:
        tokens = torch.stack([row[:, i, j] for i, j in places])
        q, k, v = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).view(12, 3, 4, 3).permute(1, 2, 0, 3)
        o = []
        for h in range(4):
            tau = (1 + mixer.temperature[h].exp()).log()
            logits = (unit(q[h]) + mixer.query_embedding[h]) * tau * math.log(12) @ unit(k[h]).T
            bias = [[literal_position(mixer, a, c, (3, 4), (1, 1))[h] for c in places] for a in places]
            o.append((logits + torch.stack([torch.stack(b) for b in bias])).softmax(-1) @ v[h])
        g = torch.stack([torch.stack(literal_gate(mixer.gate, token, 4)) for token in tokens])
        y = torch.cat([o[h] * g[:, h, None] for h in range(4)], -1) @ mixer.proj.weight.T + mixer.proj.bias
        rows.append(y.T.view(12, 3, 4))
    assert_same_with_gradients(mixer, x, mixer(x), torch.stack(rows))


def test_aggregated_form_equals_the_card():
    mixer = MixtureOfHeadAggregatedAttention(
        6, heads=2, shared_heads=1, routed_heads=1, window=3, pool_ratio=2, dtype=torch.float64
    )
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    height, width = 4, 6
    x = torch.randn(1, 6, height, width, dtype=torch.float64, requires_grad=True)
    places = [(i, j) for i in range(height) for j in range(width)]
    cells = [(i, j) for i in range(2) for j in range(3)]
    tokens = {(i, j): x[0, :, i, j] for i, j in places}

    def keys_values(token):
        k, v = (mixer.kv.weight @ token + mixer.kv.bias).view(2, 2, 3)
        return unit(k), v

    wide = {at: F.gelu(mixer.reduce.weight @ t + mixer.reduce.bias) for at, t in tokens.items()}
    pooled = {}
    for a, b in cells:
        mean = sum(wide[2 * a + i, 2 * b + j] for i in range(2) for j in range(2)) / 4
        normed = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
        pooled[a, b] = keys_values(normed * mixer.norm.weight + mixer.norm.bias)
    y = torch.zeros(6, height, width, dtype=torch.float64)
    for i, j in places:
        q = unit((mixer.query.weight @ tokens[i, j] + mixer.query.bias).view(2, 3))
        window = [(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
        near = {w: keys_values(tokens[at]) for w, at in enumerate(window) if at in tokens}
        gates = literal_gate(mixer.gate, tokens[i, j], 2)
        heads = []
        for h in range(2):
            tau = (1 + mixer.temperature[h, 0, 0].exp()).log()
            scaled = (q[h] + mixer.query_embedding[h, 0]) * tau * math.log(len(near) + 6)
            logits = [scaled @ k[h] + mixer.local_bias[h, w] for w, (k, _) in near.items()]
            logits += [
                scaled @ pooled[c][0][h] + literal_position(mixer, (i, j), c, (height, width), (2, 2))[h]
                for c in cells
            ]
            a = softmax(logits)
            o = sum(
                (a[number] + q[h] @ mixer.tokens[h, :, w] + mixer.token_bias[h, 0, w]) * v[h]
                for number, (w, (_, v)) in enumerate(near.items())
            )
            heads.append(
                gates[h] * (o + sum(a[len(near) + n] * pooled[c][1][h] for n, c in enumerate(cells)))
            )
        y[:, i, j] = mixer.proj.weight @ torch.cat(heads) + mixer.proj.bias
    assert_same_with_gradients(mixer, x, mixer(x), y[None])


def test_offsets_may_be_measured_in_another_size():
    make = MixtureOfHeadVisionAttention
    torch.manual_seed(0)
    mixer, own = make(12, heads=4, trained_size=(3, 3)), make(12, heads=4)
    own.load_state_dict(mixer.state_dict())
    small, large = torch.randn(1, 12, 3, 3), torch.randn(1, 12, 5, 3)
    torch.testing.assert_close(mixer(small), own(small))
    assert not torch.allclose(mixer(large), own(large))


def test_parameters_on_maps():
    """The 576-wide attention of the last stage of MoH-TransNeXt small, and a first-stage one."""
    last = MixtureOfHeadVisionAttention(576, heads=24, shared_heads=4, routed_heads=12, device="meta")
    positions = 2 * 512 + 512 + 512 * 24 + 24
    plain = 4 * 576 * 576 + 4 * 576 + 24 + 24 * 24 + positions
    assert sum(p.numel() for p in last.parameters()) == plain + 576 * (20 + 4 + 2)
    first = MixtureOfHeadAggregatedAttention(72, heads=3, shared_heads=3, routed_heads=0, device="meta")
    positions = 2 * 512 + 512 + 512 * 3 + 3
    local = 3 * 9 + 3 * 24 * 9 + 3 * 9
    plain = 5 * 72 * 72 + 5 * 72 + 2 * 72 + 3 + 3 * 24 + positions + local
    assert sum(p.numel() for p in first.parameters()) == plain + 72 * 3
    torch.testing.assert_close(
        F.softplus(MixtureOfHeadVisionAttention(8).temperature), torch.full((8, 1, 1), 1 / 0.24)
    )


@pytest.mark.door
def test_door():
    make = MixtureOfHeadAttention
    with pytest.raises(ValueError, match="shared_heads is 7, must be from 0 to heads"):
        make(12, heads=6, shared_heads=7)
    with pytest.raises(ValueError, match="routed_heads is 5, must be from 0 to 4"):
        make(12, heads=6, shared_heads=2, routed_heads=5)
    with pytest.raises(ValueError, match="routed_heads is 0, must be at least 1"):
        MixtureOfHeadLlamaAttention(12, heads=6, shared_heads=2, routed_heads=0)
    with pytest.raises(ValueError, match="window is 4, must be odd"):
        MixtureOfHeadAggregatedAttention(12, heads=4, window=4)
