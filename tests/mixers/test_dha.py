"""Decoupled-head attention: the card in loops, MHA and GQA as special cases, fusion of heads."""

from __future__ import annotations

import pytest
import torch

from heedful.convert.dha_fusion import fuse_heads, fusion_loss, lagrangian, merge_groups
from heedful.mixers.heads.dha import DecoupledHeadAttention
from heedful.mixers.heads.self_attention import SelfAttention

MAPS = {"key_heads": 2, "key_map": (0, 1, 1, 0, 1, 0), "value_heads": 3, "value_map": (2, 0, 0, 1, 1, 2)}


def make(**options):
    return DecoupledHeadAttention(12, heads=6, head_dim=4, dtype=torch.float64, **{**MAPS, **options})


def turned(z, base):
    n, d = z.shape
    angle = torch.arange(n, dtype=z.dtype)[:, None] * base ** (-torch.arange(0, d, 2, dtype=z.dtype) / d)
    u, v = z[:, : d // 2], z[:, d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_card(causal):
    mixer = make(causal=causal, rotary_base=20.0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    rows = []
    for row in x:
        heads = []
        for h in range(6):
            a, b = MAPS["key_map"][h] * 4, MAPS["value_map"][h] * 4
            q = turned(row @ mixer.query.weight[4 * h : 4 * h + 4].T, 20.0)
            k = turned(row @ mixer.key.weight[a : a + 4].T, 20.0)
            v = row @ mixer.value.weight[b : b + 4].T
            logits = q @ k.T / 2
            heads.append((logits.masked_fill(hidden, -torch.inf) if causal else logits).softmax(-1) @ v)
        rows.append(torch.cat(heads, -1) @ mixer.out.weight.T)
    ours, expected = mixer(x), torch.stack(rows)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )


def plain_like(mixer, kv_heads):
    plain = SelfAttention(
        12,
        heads=6,
        kv_heads=kv_heads,
        head_dim=4,
        causal=True,
        rotary=True,
        qkv_bias=False,
        dtype=torch.float64,
    )
    plain.load_state_dict({**mixer.state_dict(), "out.bias": torch.zeros(12)})
    return plain


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_equal_maps_of_neighbours_are_grouped_query_attention(kv_heads):
    mixer = make(key_heads=kv_heads, value_heads=kv_heads, key_map=None, value_map=None)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain_like(mixer, kv_heads)(x))


def test_decoding_keeps_both_kinds_of_heads():
    mixer = make()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    state, pieces = mixer.init_state(2), []
    for part in x.split((3, 1, 1, 2), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    assert state.nbytes() == 2 * 7 * (2 + 3) * 4 * 8  # batch, tokens, heads, width, bytes


def test_parameters_and_default_maps():
    mixer = DecoupledHeadAttention(64, heads=8, key_heads=3)
    assert sum(p.numel() for p in mixer.parameters()) == 2 * 64 * 64 + (3 + 2) * 8 * 64
    assert mixer.key_map == [0, 0, 0, 1, 1, 1, 2, 2]
    assert mixer.value_map == [0, 0, 0, 0, 1, 1, 1, 1]


# Fusion.

GROUP = torch.tensor([0, 1, 1, 0, 1, 2])


def test_fusion_is_a_combination_within_the_group():
    weight, ratios = torch.randn(6, 4, 12).double(), torch.randn(6, 6).double()
    fused = fuse_heads(weight, ratios, GROUP)
    for i in range(6):
        members = [m for m in range(6) if GROUP[m] == GROUP[i]]
        torch.testing.assert_close(fused[i], sum(ratios[i, m] * weight[m] for m in members))
    torch.testing.assert_close(fuse_heads(weight, torch.eye(6).double(), GROUP), weight)
    mean = 1 / torch.bincount(GROUP)[GROUP][:, None].expand(6, 6).double()
    torch.testing.assert_close(fuse_heads(weight, mean, GROUP)[1], weight[[1, 2, 4]].mean(0))


def test_fusion_loss_is_the_sum_over_pairs():
    fused = torch.randn(6, 4, 12, dtype=torch.float64, requires_grad=True)
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6) if GROUP[i] == GROUP[j]]
    expected = sum((fused[i] - fused[j]).square().sum() for i, j in pairs)
    ours = fusion_loss(fused, GROUP)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, fused), torch.autograd.grad(expected, fused))


def test_fused_heads_may_be_merged_without_loss():
    """Multi-head attention whose groups are alike equals decoupled heads with the groups as maps."""
    whole = make(key_heads=6, value_heads=6, key_map=None, value_map=None)
    key_group, value_group = torch.tensor(MAPS["key_map"]), torch.tensor(MAPS["value_map"])
    merged = make()
    merged.query, merged.out = whole.query, whole.out
    with torch.no_grad():
        for name, group in (("key", key_group), ("value", value_group)):
            linear = getattr(whole, name)
            mean = 1 / torch.bincount(group)[group][:, None].expand(6, 6).double()
            fused = fuse_heads(linear.weight.unflatten(0, (6, 4)), mean, group)
            assert fusion_loss(fused, group) < 1e-25  # the square of float64's rounding
            linear.weight.copy_(fused.flatten(0, 1))
            getattr(merged, name).weight.copy_(merge_groups(fused, group).flatten(0, 1))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(merged(x), whole(x))


def test_training_the_ratios_brings_a_group_together():
    """The Lagrangian with a falling target, as in the fusion stage."""
    torch.manual_seed(0)
    weight, start = torch.randn(6, 4, 12), torch.eye(6)
    ratios = start.clone().requires_grad_()
    linear, square = torch.zeros((), requires_grad=True), torch.ones((), requires_grad=True)
    down = torch.optim.SGD([ratios], lr=1e-3)
    first = float(fusion_loss(weight, GROUP))
    for step in range(60):
        loss = fusion_loss(fuse_heads(weight, ratios, GROUP), GROUP) / first
        value = lagrangian(loss, max(0.0, 1 - step / 40), linear, square)
        for p in (ratios, linear, square):
            p.grad = None
        value.backward()
        down.step()
        with torch.no_grad():
            linear += 20 * linear.grad
            square += 20 * square.grad
    assert loss < 0.05
    torch.testing.assert_close(
        lagrangian(loss, 0.5, linear, square), linear * (loss - 0.5) + square / 2 * (loss - 0.5) ** 2
    )


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match=r"key_map is \(0, 0, 0, 0, 0, 0\), must hold"):
        make(key_map=(0,) * 6)
    with pytest.raises(ValueError, match="value_heads is 7, must be at most heads"):
        make(value_heads=7)
    with pytest.raises(ValueError, match="group is"):
        merge_groups(torch.zeros(2, 1, 1), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="ratios has shape"):
        fuse_heads(torch.zeros(2, 1, 1), torch.zeros(2, 3), torch.tensor([0, 1]))
