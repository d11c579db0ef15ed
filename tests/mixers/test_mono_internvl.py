"""Modality experts: a layer token by token, routing by kind alone, initialisation, released sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from heedful.mixers.heads.mono_internvl import ModalityExpertLayer, ModalityExperts

N = 6


def build(**options):
    torch.manual_seed(0)
    options = {"dim": 12, "heads": 6, "kv_heads": 2, "hidden": 7, "rotary_base": 50.0, **options}
    mixer = ModalityExpertLayer(**options).double()
    for q in mixer.parameters():
        nn.init.normal_(q, std=0.6)
    x = torch.randn(2, N, 12, dtype=torch.float64, requires_grad=True)
    visual = torch.tensor([[True, True, False, True, False, False], [False] * 4 + [True] * 2])
    return mixer, x, visual


def literal(mixer, x, visual):
    """The card's layer, one row, one head and one token at a time."""
    d, g, h = mixer.head_dim, mixer.kv_heads, mixer.heads

    def expert(layer, u, kind):
        if isinstance(layer, ModalityExperts):
            layer = layer.visual if kind else layer.text
        return layer.weight @ u

    def norm(u, weight):
        return u / (u.pow(2).mean() + 1e-5).sqrt() * weight

    def turn(u, t):
        out = []
        for j in range(d):
            angle = torch.tensor(t * 50.0 ** (-2 * (j % (d // 2)) / d), dtype=u.dtype)
            other = -u[j + d // 2] if j < d // 2 else u[j - d // 2]
            out.append(u[j] * angle.cos() + other * angle.sin())
        return torch.stack(out)

    rows = []
    for b in range(x.shape[0]):
        projected = [
            expert(mixer.qkv, norm(x[b, t], mixer.attention_norm.weight), visual[b, t]) for t in range(N)
        ]
        tokens = []
        for t in range(N):
            heads = []
            for head in range(h):
                group, place = head // (h // g), head % (h // g)
                first = group * (h // g + 2) * d
                q = turn(projected[t][first + place * d :][:d], t)
                at = first + (h // g) * d
                keys = torch.stack([turn(projected[s][at : at + d], s) for s in range(t + 1)])
                values = torch.stack([projected[s][at + d : at + 2 * d] for s in range(t + 1)])
                heads.append((keys @ q / d**0.5).softmax(0) @ values)
            u = x[b, t] + expert(mixer.out, torch.cat(heads), visual[b, t])
            net = mixer.ffn.visual if visual[b, t] else mixer.ffn.text
            z = norm(u, mixer.ffn_norm.weight)
            gate = net.gate.weight @ z
            tokens.append(u + net.down.weight @ (gate * gate.sigmoid() * (net.up.weight @ z)))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("attention_experts", [False, True])
def test_equals_the_card(attention_experts):
    mixer, x, visual = build(attention_experts=attention_experts)
    y, expected = mixer(x, visual=visual), literal(mixer, x, visual)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    grads = torch.autograd.grad((y * weight).sum(), leaves)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(grad, want)


def test_experts_start_as_copies_so_the_kind_does_not_matter():
    torch.manual_seed(0)
    mixer = ModalityExpertLayer(12, heads=2, attention_experts=True, dtype=torch.float64)
    x = torch.randn(2, N, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, visual=torch.rand(2, N) < 0.5), mixer(x))


def test_text_alone_knows_nothing_of_the_visual_experts():
    mixer, x, visual = build(attention_experts=True)
    y = mixer(x, visual=torch.zeros_like(visual))
    torch.testing.assert_close(y, mixer(x))
    y.sum().backward()
    for name, q in mixer.named_parameters():
        gone = q.grad is None or not q.grad.any()
        assert gone == (".visual." in name), name


def test_an_expert_that_overflows_reaches_no_other_kind():
    mixer, x, visual = build()
    with torch.no_grad():
        mixer.ffn.visual.down.weight.fill_(torch.nan)
    y = mixer(x, visual=visual)
    assert y[~visual].isfinite().all()
    y[~visual].sum().backward()
    assert mixer.ffn.text.down.weight.grad.isfinite().all()


def test_a_late_image_token_takes_its_expert_and_the_cache_is_that_of_the_language_model():
    mixer, x, visual = build()
    whole = mixer(x, visual=visual)
    y, state = mixer(x[:1, :3], visual=visual[:1, :3], state=mixer.init_state(1))
    late, state = mixer(x[:1, 3:4], visual=visual[:1, 3:4], state=state)
    torch.testing.assert_close(torch.cat([y, late], 1), whole[:1, :4])
    assert state.nbytes() == 4 * 2 * mixer.kv_heads * mixer.head_dim * 8


def test_parameters_of_the_released_2b_layers():
    def count(**options):
        layer = ModalityExpertLayer(2048, heads=16, kv_heads=8, device="meta", **options)
        return sum(q.numel() for q in layer.parameters())

    ffn, attention = 3 * 2048 * 8192, 2048 * 4096 + 2048 * 2048
    assert count() == 2 * ffn + attention + 2 * 2048
    assert count(attention_experts=True) - count() == attention
    assert 24 * ffn == 1_207_959_552  # what the visual experts add


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="kv_heads is 3, must divide heads, which is 4"):
        ModalityExpertLayer(16, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="even number of channels a head"):
        ModalityExpertLayer(12, heads=4)
    with pytest.raises(ValueError, match="hidden is 0"):
        ModalityExpertLayer(16, heads=4, hidden=0)
    with pytest.raises(ValueError, match=r"visual has shape \(2, 5\)"):
        ModalityExpertLayer(16, heads=4)(torch.zeros(2, 4, 16), visual=torch.zeros(2, 5, dtype=torch.bool))
