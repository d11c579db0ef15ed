"""Phantom: the card in loops, plain attention at eta 0, the special token and the cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import heedful
from heedful.mixers.heads.phantom import PhantomAttention
from heedful.mixers.heads.self_attention import SelfAttention


def make(**options):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 6, "eta": 0.7}
    return PhantomAttention(10, dtype=torch.float64, **{**sizes, **options})


def turned(z, base):
    n, d = z.shape[-2:]
    angle = torch.arange(n, dtype=z.dtype)[:, None] * base ** (-torch.arange(0, d, 2, dtype=z.dtype) / d)
    u, v = z[..., : d // 2], z[..., d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


def literal_copy(copy, heads, special):
    """One token: each head (d) attends to the heads of the special token."""
    keys = [F.gelu(copy.key.weight @ z) for z in special]
    values = [F.gelu(copy.value.weight @ z) for z in special]
    made = []
    for x in heads:
        query = F.gelu(copy.query.weight @ x)
        weight = [(query @ k / len(x) ** 0.5).exp() for k in keys]
        mixed = sum(w * v for w, v in zip(weight, values, strict=True)) / sum(weight)
        made.append(copy.eta * F.gelu(copy.out.weight @ mixed))
    return torch.stack(made)


def literal(mixer, x, first):
    """One row, one token, one head at a time; keys before the special token are padding."""
    d, rows = mixer.head_dim, []
    for row, f in zip(x, first, strict=True):
        q, k, v = (
            (row @ m.weight.T).unflatten(1, (-1, d)).transpose(0, 1)
            for m in (mixer.query, mixer.key, mixer.value)
        )
        if mixer.rotary_base is not None:
            q, k = turned(q, mixer.rotary_base), turned(k, mixer.rotary_base)
        n = len(row)
        q2 = torch.stack([literal_copy(mixer.query_copy, q[:, t], q[:, f]) for t in range(n)], 1)
        k2 = torch.stack([literal_copy(mixer.key_copy, k[:, t], k[:, f]) for t in range(n)], 1)
        v2 = v + torch.stack([literal_copy(mixer.value_copy, v[:, t], v[:, f]) for t in range(n)], 1)
        tokens = []
        for t in range(f, n):
            heads = []
            for h in range(mixer.heads):
                g = h // (mixer.heads // mixer.kv_heads)
                score = torch.stack(
                    [(q[h, t] @ k[g, s] + q2[h, t] @ k2[g, s]) / d**0.5 for s in range(f, t + 1)]
                )
                weight = score.exp() / score.exp().sum()
                o1, o2 = weight @ v[g, f : t + 1], weight @ v2[g, f : t + 1]
                w1 = (mixer.gate_first.weight @ o1 + mixer.gate_first.bias).exp()
                w2 = (mixer.gate_second.weight @ o2 + mixer.gate_second.bias).exp()
                heads.append((w1 * o1 + w2 * o2) / (w1 + w2))
            tokens.append(mixer.out.weight @ torch.cat(heads))
        rows.append(torch.stack(tokens))
    return rows


@pytest.mark.parametrize("padding", [(0, 0), (0, 2)])
def test_equals_the_card(padding):
    mixer = make(rotary_base=40.0)
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) >= torch.tensor(padding)[:, None]
    ours = mixer(x, mask=None if padding == (0, 0) else mask)
    ours, expected = ours[mask], torch.cat(literal(mixer, x, padding))
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )


def test_without_eta_it_is_plain_attention():
    mixer = make(eta=0.0)
    plain = SelfAttention(
        10, heads=4, kv_heads=2, head_dim=6, causal=True, rotary=True, qkv_bias=False, dtype=torch.float64
    )
    shared = {n: p for n, p in mixer.state_dict().items() if "copy" not in n and "gate" not in n}
    plain.load_state_dict({**shared, "out.bias": torch.zeros(10)})
    x = torch.randn(2, 7, 10, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(x))


@pytest.mark.parametrize(("d", "extra"), [(128, 196_866), (64, 49_282)])
def test_parameters(d, extra):
    mixer = PhantomAttention(4 * d, heads=4, kv_heads=2, device="meta")
    assert sum(p.numel() for p in mixer.parameters()) == 3 * (4 * d) ** 2 + extra


def test_decoding_keeps_keys_and_values_and_one_query():
    mixer = make()
    x = torch.randn(3, 7, 10, dtype=torch.float64)
    state, pieces = mixer.init_state(3), []
    for part in x.split((1, 3, 1, 2), 1):
        y, state = mixer(part, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    token, once = 2 * 2 * 6 * 8, 4 * 6 * 8  # two, KV heads, width, bytes; query heads, width, bytes
    assert state.nbytes() == 3 * (7 * token + once)


def test_special_token_may_come_with_a_later_piece():
    mixer = make()
    x = torch.randn(2, 6, 10, dtype=torch.float64)
    mask = torch.arange(6) >= torch.tensor([[1], [4]])
    state, pieces = mixer.init_state(2), []
    for part, seen in zip(x.split((3, 2, 1), 1), mask.split((3, 2, 1), 1), strict=True):
        y, state = mixer(part, mask=seen, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask], mixer(x, mask=mask)[mask])


def test_loads_the_authors_joint_projections():
    mixer, x = make(), torch.randn(1, 4, 10, dtype=torch.float64)
    own = mixer.state_dict()
    q, k, v = (own[f"{n}.weight"].unflatten(0, (2, -1, 6)) for n in ("query", "key", "value"))
    theirs = {"wo.weight": own["out.weight"]}
    for name, tensor in own.items():
        if "copy" in name:
            kind, linear, weight = name.split(".")
            theirs[f"xattn_{kind.split('_')[0]}_phantom.linear_{linear[0]}.{weight}"] = tensor
        elif "gate" in name:
            theirs[
                name.replace("gate_first", "gating_phantom_1").replace("gate_second", "gating_phantom_2")
            ] = tensor
    grouped = torch.cat([q, k, v], dim=1).flatten(0, 2)
    apart = torch.cat([part.flatten(0, 2) for part in (q, k, v)])
    for name, joined in (("wqkv", grouped), ("qkv_proj", apart)):
        other = heedful.authors.load(make(), {**theirs, f"{name}.weight": joined})
        torch.testing.assert_close(other(x), mixer(x))


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="kv_heads is 3, must divide heads"):
        make(kv_heads=3)
    with pytest.raises(ValueError, match="head_dim is 5, must be even"):
        make(head_dim=5)
