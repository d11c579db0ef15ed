"""Sparse query attention: identities with multi-head and grouped-query attention, figures of the paper."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.heads.sqa import SparseQueryAttention


def literal(mixer, x, causal, rotary):
    """The card's steps, dense: rotary with the parts of each pair written one after the other."""
    b, t, _ = x.shape
    d = mixer.head_dim

    def heads(layer):
        return layer(x).view(b, t, -1, d).transpose(1, 2)

    q, k, v = heads(mixer.query), heads(mixer.key), heads(mixer.value)
    if rotary:
        frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
        angle = torch.arange(t, dtype=x.dtype)[:, None] * frequency
        q, k = (
            torch.cat(
                [
                    z[..., 0::2] * angle.cos() - z[..., 1::2] * angle.sin(),
                    z[..., 1::2] * angle.cos() + z[..., 0::2] * angle.sin(),
                ],
                dim=-1,
            )
            for z in (q, k)
        )
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    logits = q @ k.mT / d**0.5
    if causal:
        logits = logits.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
    return mixer.out((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 2), (4, 4), (2, 1), (8, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_equals_the_card(query_heads, kv_heads, causal, rotary):
    mixer = SparseQueryAttention(
        32,
        heads=8,
        query_heads=query_heads,
        kv_heads=kv_heads,
        causal=causal,
        rotary=rotary,
        dtype=torch.float64,
    )
    x = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), literal(mixer, x, causal, rotary)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want)


def test_is_grouped_query_attention_with_explicit_head_width():
    ours = SparseQueryAttention(32, heads=8, query_heads=4, kv_heads=2, causal=True)
    grouped = SelfAttention(32, heads=4, kv_heads=2, head_dim=4, causal=True, qkv_bias=False)
    grouped.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 9, 32)
    assert torch.equal(ours(x), grouped(x))


def test_all_query_heads_is_multi_head_attention():
    ours = SparseQueryAttention(32, heads=8, query_heads=8, kv_heads=8)
    plain = SelfAttention(32, heads=8, qkv_bias=False)
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 9, 32)
    assert torch.equal(ours(x), plain(x))


def test_defaults_and_biases():
    mixer = SparseQueryAttention(32, heads=8)
    assert {name: tuple(q.shape) for name, q in mixer.named_parameters()} == {
        "query.weight": (16, 32),
        "key.weight": (8, 32),
        "value.weight": (8, 32),
        "out.weight": (32, 16),
        "out.bias": (32,),
    }


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "parameters"),
    [(16, 16, 262400), (16, 4, 164096), (8, 4, 98560), (8, 8, 131328), (4, 4, 65792), (4, 1, 41216)],
)
def test_parameters_of_the_papers_dense_models(query_heads, kv_heads, parameters):
    # dim 256, 16 heads of 16: (query_heads + 2 kv_heads) * 16 * 256 + query_heads * 16 * 256 + 256
    mixer = SparseQueryAttention(256, heads=16, query_heads=query_heads, kv_heads=kv_heads)
    assert sum(q.numel() for q in mixer.parameters()) == parameters


def test_flops_of_scores_and_sums_fall_with_the_query_heads():
    def attention_flops(query_heads):
        mixer = SparseQueryAttention(32, heads=8, query_heads=query_heads, kv_heads=1)
        x = torch.randn(2, 24, 32)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            mixer(x, context=x)
        linear = 2 * x.shape[0] * x.shape[1] * 32 * (2 * query_heads * 4 + 2 * 4)
        return counter.get_total_flops() - linear

    assert attention_flops(8) == 4 * 2 * 8 * 24 * 24 * 4
    assert attention_flops(2) * 4 == attention_flops(8)


def test_decoding_equals_the_full_pass():
    mixer = SparseQueryAttention(32, heads=8, causal=True, rotary=True).eval()
    x = torch.randn(2, 7, 32)
    state, pieces = mixer.init_state(2), []
    for part in x.split((3, 1, 1, 2), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x), rtol=1e-5, atol=1e-6)
    assert state.nbytes() == 2 * 2 * 2 * 7 * 4 * 4  # key and value, batch, kv heads, tokens, width, bytes


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="query_heads is 3"):
        SparseQueryAttention(32, heads=8, query_heads=3)
    with pytest.raises(ValueError, match="kv_heads is 8, must divide query_heads"):
        SparseQueryAttention(32, heads=8, query_heads=4, kv_heads=8)
