"""Multi-matrix factorization attention: the card in loops, multi-query attention, figures of the paper."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.heads.step3_mfa import MultiMatrixFactorizationAttention


def turned(z, base):
    n, d = z.shape
    angle = torch.arange(n, dtype=z.dtype)[:, None] * base ** (-torch.arange(0, d, 2, dtype=z.dtype) / d)
    u, v = z[:, : d // 2], z[:, d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


def literal(mixer, x, source, causal, rotary):
    """The card's steps, one batch row and one head at a time."""
    d = mixer.head_dim
    hidden = torch.ones(x.shape[1], source.shape[1], dtype=torch.bool).triu(1)
    rows = []
    for row, of in zip(x, source, strict=True):
        low = row @ mixer.query_down.weight.T
        low = low / (low.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.query_norm.weight
        k, v = of @ mixer.key.weight.T, of @ mixer.value.weight.T
        k = turned(k, mixer.rotary_base) if rotary else k
        heads = []
        for q in (low @ mixer.query_up.weight.T).split(d, -1):
            q = turned(q, mixer.rotary_base) if rotary else q
            logits = q @ k.T / d**0.5
            heads.append((logits.masked_fill(hidden, -torch.inf) if causal else logits).softmax(-1) @ v)
        rows.append(torch.cat(heads, -1) @ mixer.out.weight.T)
    return torch.stack(rows)


def make(**options):
    sizes = {"heads": 3, "head_dim": 6, "query_rank": 5}
    mixer = MultiMatrixFactorizationAttention(8, dtype=torch.float64, **{**sizes, **options})
    torch.nn.init.normal_(mixer.query_norm.weight)
    return mixer


@pytest.mark.parametrize(("causal", "cross"), [(True, False), (False, False), (True, True)])
def test_equals_the_card(causal, cross):
    mixer = make(causal=causal, rotary_base=50.0)
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 9, 8, dtype=torch.float64) if cross else None
    ours = mixer(x, context=context)
    expected = literal(mixer, x, x if context is None else context, causal and not cross, not cross)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want)


def test_without_the_norm_it_is_multi_query_attention_of_low_rank():
    mixer = make(rotary_base=None)
    mixer.query_norm = torch.nn.Identity()
    mixer.query_norm.weight = torch.ones(1, dtype=torch.float64)
    plain = SelfAttention(
        8, heads=3, kv_heads=1, head_dim=6, causal=True, qkv_bias=False, dtype=torch.float64
    )
    with torch.no_grad():
        plain.query.weight.copy_(mixer.query_up.weight @ mixer.query_down.weight)
        plain.out.bias.zero_()
        for name in ("key", "value", "out"):
            getattr(plain, name).weight.copy_(getattr(mixer, name).weight)
    assert torch.linalg.matrix_rank(plain.query.weight) == 5
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(x))


def test_parameters_at_full_size():
    mixer = MultiMatrixFactorizationAttention(7168, device="meta")
    assert {name: p.numel() for name, p in mixer.named_parameters()} == {
        "query_down.weight": 14_680_064,
        "query_norm.weight": 2_048,
        "query_up.weight": 33_554_432,
        "key.weight": 7168 * 256,
        "value.weight": 7168 * 256,
        "out.weight": 117_440_512,
    }
    assert sum(p.numel() for p in mixer.parameters()) == 169_347_072


def test_decoding_keeps_one_key_and_value():
    mixer = make()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    state, pieces = mixer.init_state(2), []
    for part in x.split((3, 1, 1, 2), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    assert state.nbytes() == 2 * 2 * 7 * 6 * 8  # key and value, batch, tokens, width, bytes


def test_only_differences_of_positions_count():
    mixer = make()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, positions=torch.arange(3, 8)), mixer(x))
    assert not torch.allclose(mixer(x, positions=2 * torch.arange(5)), mixer(x))


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="query_rank is 0"):
        make(query_rank=0)
    with pytest.raises(ValueError, match="head_dim is 5, must be even"):
        make(head_dim=5)
    mixer, x = make(), torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="state is given, must be None with a context"):
        mixer(x, context=x, state=mixer.init_state(2))
    with pytest.raises(ValueError, match="context has batch 1, must be 2"):
        mixer(x, context=x[:1])
