"""Multi-head latent attention: the equations in loops, its two forms, its cache, and its start by SVD."""

from __future__ import annotations

import pytest
import torch

import heedful
from heedful import authors
from heedful.convert.mla_init import mla_from_attention, truncated_svd
from heedful.mixers.heads.multi_head_latent_attention import MultiHeadLatentAttention
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.ops.rotary import Yarn

SIZES = {"heads": 3, "query_rank": 7, "kv_rank": 6, "nope_dim": 3, "rope_dim": 4, "value_dim": 5}


def make(**options):
    mixer = MultiHeadLatentAttention(10, dtype=torch.float64, **{**SIZES, **options})
    for norm in (mixer.query_norm, mixer.kv_norm):
        if norm is not None:
            torch.nn.init.normal_(norm.weight)
    return mixer


def turned(z, base):
    """Neighbouring channels as a complex number, times e^(i position base^(-2 j / d))."""
    n, d = z.shape
    angle = torch.arange(n, dtype=z.dtype)[:, None] * base ** (-torch.arange(0, d, 2, dtype=z.dtype) / d)
    u, v = z[:, 0::2], z[:, 1::2]
    return torch.stack([u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()], -1).flatten(1)


def rms(z, norm):
    return z if norm is None else z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def literal(mixer, x):
    """One row and one head at a time."""
    h, r, dn, dr, dv = mixer.heads, mixer.kv_rank, mixer.nope_dim, mixer.rope_dim, mixer.value_dim
    n = x.shape[1]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    rows = []
    for row in x:
        if mixer.query_rank is None:
            q = row @ mixer.query.weight.T
        else:
            q = rms(row @ mixer.query_down.weight.T, mixer.query_norm) @ mixer.query_up.weight.T
        u = row @ mixer.kv_down.weight.T
        kv = rms(u[:, :r], mixer.kv_norm) @ mixer.kv_up.weight.T
        shared = turned(u[:, r:], mixer.rotary_base)
        heads = []
        for i in range(h):
            qi = q[:, i * (dn + dr) : (i + 1) * (dn + dr)]
            kvi = kv[:, i * (dn + dv) : (i + 1) * (dn + dv)]
            logits = qi[:, :dn] @ kvi[:, :dn].T + turned(qi[:, dn:], mixer.rotary_base) @ shared.T
            logits = logits / (dn + dr) ** 0.5
            if mixer.causal:
                logits = logits.masked_fill(hidden, -torch.inf)
            heads.append(logits.softmax(-1) @ kvi[:, dn:])
        rows.append(torch.cat(heads, -1) @ mixer.out.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False, "latent_norm": False}, {"query_rank": None, "rotary_base": 30.0}],
    ids=["causal", "no norm", "no query rank"],
)
def test_equals_the_equations(options):
    mixer = make(**options)
    x = torch.randn(2, 6, 10, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), literal(mixer, x)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )


@pytest.mark.parametrize("rope_dim", [0, 4])
def test_absorbed_equals_expanded(rope_dim):
    mixer = make(rope_dim=rope_dim)
    x = torch.randn(2, 6, 10, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    query, latent = mixer.project(x)
    ours, expected = (form(query, latent, mask=mask) for form in (mixer.absorbed, mixer.expanded))
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), mixer.kv_up.weight, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), mixer.kv_up.weight),
    )


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 0.707), (1.0, 0.0)])
def test_yarn_equals_deepseek_in_transformers(mscale, all_dim):
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    torch.manual_seed(0)
    scaling = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 8.0, "beta_fast": 4, "beta_slow": 1}
    scaling |= {"original_max_position_embeddings": 64, "mscale": mscale, "mscale_all_dim": all_dim}
    config = transformers.DeepseekV3Config(
        hidden_size=10,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=7,
        kv_lora_rank=6,
        qk_nope_head_dim=3,
        qk_rope_head_dim=8,
        v_head_dim=5,
        max_position_embeddings=512,
        rope_parameters=scaling,
        attn_implementation="eager",
    )
    layer = theirs.DeepseekV3Attention(config, 0).double().eval()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 30, 10, dtype=torch.float64)
    angles = theirs.DeepseekV3RotaryEmbedding(config)(x, torch.arange(30)[None])
    hidden = torch.full((30, 30), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    expected, _ = layer(x, angles, hidden)
    yarn = Yarn(8.0, original_length=64, beta_fast=4, mscale=mscale, mscale_all_dim=all_dim)
    assert (yarn.slowing(8, 50.0).diff() < -0.1).all()  # some pairs are neither kept nor stretched in full
    mixer = make(rope_dim=8, rotary_base=50.0, yarn=vars(yarn))
    assert mixer.yarn == yarn
    authors.load(mixer, layer.state_dict())
    # transformers' angles are float32
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)
    plain = make(rope_dim=8, rotary_base=50.0)
    authors.load(plain, layer.state_dict())
    assert not torch.allclose(plain(x), expected, atol=1e-2)
    state = mixer.init_state(2)
    first, state = mixer(x[:, :20], state=state)
    torch.testing.assert_close(torch.cat([first, mixer(x[:, 20:], state=state)[0]], 1), mixer(x))


def test_decoding_keeps_latents_and_rotary_keys():
    mixer = make()
    x = torch.randn(2, 7, 10, dtype=torch.float64)
    state, pieces = mixer.init_state(2), []
    for part in x.split((3, 1, 1, 2), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    assert state.nbytes() == 2 * 7 * (6 + 4) * 8  # batch, tokens, r + d_r, bytes


@pytest.mark.parametrize(("rank", "percent"), [(64, 9.4), (128, 15.6), (48, 7.8), (512, 53.1)])
def test_cache_of_the_converted_one_billion_model(rank, percent):
    mixer = MultiHeadLatentAttention(
        64, heads=32, query_rank=8, kv_rank=rank, nope_dim=32, rope_dim=32, value_dim=64, dtype=torch.bfloat16
    )
    _, state = mixer(torch.randn(1, 3, 64, dtype=torch.bfloat16), state=mixer.init_state(1))
    old = 2 * 8 * 64 * 2  # keys and values of 8 heads of 64 channels, in bytes
    assert round(100 * state.nbytes() / 3 / old, 1) == percent


def test_parameters():
    def count(**options):
        return sum(p.numel() for p in make(**options).parameters())

    factored = 10 * 7 + 7 * 3 * 7 + 10 * (6 + 4) + 6 * 3 * (3 + 5) + 3 * 5 * 10
    assert count() == factored + 7 + 6
    assert count(latent_norm=False) == factored
    assert count(query_rank=None) == factored + 6 - 10 * 7 - 7 * 3 * 7 + 10 * 3 * 7


# The start by SVD.


def old_attention(heads=4, kv_heads=2, d=6, dim=24):
    return [
        torch.randn(rows, dim, dtype=torch.float64) / dim**0.5
        for rows in (heads * d, kv_heads * d, kv_heads * d)
    ] + [torch.randn(dim, heads * d, dtype=torch.float64)]


def test_svd_error_is_the_dropped_singular_values():
    weight = torch.randn(20, 13, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    for rank in (1, 5, 13):
        up, down = truncated_svd(weight, rank=rank, multiple=1)
        assert up.shape == (20, rank)
        torch.testing.assert_close((weight - up @ down).square().sum(), values[rank:].square().sum())
        torch.testing.assert_close(up.T @ up, torch.eye(rank, dtype=torch.float64))


def test_rank_by_energy_keeps_no_more_than_asked_and_is_rounded_up():
    left, right = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] for _ in range(2))
    values = torch.tensor([4.0, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    weight = left * values @ right  # squares sum to 33: shares 16/33, 20/33, 24/33, 25/33, ...
    for energy, rank in ((0.1, 1), (0.5, 1), (0.65, 2), (0.74, 3), (0.76, 4)):
        assert truncated_svd(weight, energy=energy, multiple=1)[0].shape[1] == rank
        assert truncated_svd(weight, energy=energy, multiple=5)[0].shape[1] == 5
    assert truncated_svd(weight, rank=9, multiple=8)[0].shape[1] == 12  # not more than there are


def test_full_ranks_without_positions_equal_the_old_attention():
    q, k, v, o = old_attention()
    plain = SelfAttention(24, heads=4, kv_heads=2, causal=True, qkv_bias=False, dtype=torch.float64)
    plain.load_state_dict(
        {"query.weight": q, "key.weight": k, "value.weight": v, "out.weight": o, "out.bias": o.new_zeros(24)}
    )
    weights = mla_from_attention(
        q, k, v, o, heads=4, kv_heads=2, nope_dim=6, rope_dim=0, query_rank=24, kv_rank=24
    )
    mixer = MultiHeadLatentAttention(
        24,
        heads=4,
        query_rank=24,
        kv_rank=24,
        nope_dim=6,
        rope_dim=0,
        value_dim=6,
        latent_norm=False,
        dtype=torch.float64,
    )
    mixer.load_state_dict(weights)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(x))


def test_full_ranks_keep_queries_the_first_rows_of_keys_and_the_mean_rotary_key():
    q, k, v, o = old_attention()
    weights = mla_from_attention(
        q, k, v, o, heads=4, kv_heads=2, nope_dim=2, rope_dim=4, query_rank=24, kv_rank=24
    )
    torch.testing.assert_close(weights["query_up.weight"] @ weights["query_down.weight"], q)
    made = (weights["kv_up.weight"] @ weights["kv_down.weight"][:24]).unflatten(0, (4, 8))
    for head in range(4):
        old = slice(head // 2 * 6, head // 2 * 6 + 6)
        torch.testing.assert_close(made[head, :2], k[old][:2])
        torch.testing.assert_close(made[head, 2:], v[old])
    torch.testing.assert_close(weights["kv_down.weight"][24:], (k[2:6] + k[8:12]) / 2)
    assert weights["out.weight"] is o


def test_loads_what_deepseek_calls_it():
    mixer, other = make(query_rank=None), make(query_rank=None)
    names = {"query": "q_proj", "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm"}
    names |= {"kv_up": "kv_b_proj", "out": "o_proj"}
    theirs = {f"{names[n.split('.')[0]]}.weight": p for n, p in mixer.state_dict().items()}
    heedful.authors.load(other, theirs)
    x = torch.randn(1, 4, 10, dtype=torch.float64)
    torch.testing.assert_close(other(x), mixer(x))


@pytest.mark.door
def test_door():
    for name in ("heads", "query_rank", "kv_rank", "nope_dim", "value_dim"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            make(**{name: 0})
    with pytest.raises(ValueError, match="dim is 0"):
        MultiHeadLatentAttention(0, **SIZES)
    with pytest.raises(ValueError, match="rope_dim is 3, must be an even number"):
        make(rope_dim=3)
    with pytest.raises(ValueError, match="rank is None and energy is None, exactly one"):
        truncated_svd(torch.eye(3))
    with pytest.raises(ValueError, match="energy is 2, must be"):
        truncated_svd(torch.eye(3), energy=2)
    q, k, v, o = old_attention()
    sizes = {"heads": 4, "nope_dim": 2, "rope_dim": 4, "query_rank": 8, "kv_rank": 8}
    with pytest.raises(ValueError, match="key has 12 rows, must be kv_heads times 6, 24"):
        mla_from_attention(q, k, v, o, kv_heads=4, **sizes)
    with pytest.raises(ValueError, match="rope_dim is 8, must be at most 6"):
        mla_from_attention(q, k, v, o, kv_heads=2, **{**sizes, "rope_dim": 8})
