"""Dynamic mask attention: the card's steps by loops, what its mask passes, decoding, parameter counts."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.sparse.dynamic_mask_attention import DynamicMaskAttention
from heedful.patterns.causal import Causal

F64 = torch.float64


def build(seed=0, **given):
    torch.manual_seed(seed)
    mixer = DynamicMaskAttention(
        12, **{"heads": 4, "kv_heads": 2, "head_dim": 6, "window": 4, "dtype": F64, **given}
    )
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def turned(x, position):
    """Channel j of a vector of 6 with channel j + 3."""
    angle = position * 10000.0 ** (-2 * torch.arange(3, dtype=F64) / 6)
    u, v = x[:3], x[3:]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()])


def transcription(mixer, x, mask=None):
    """The card's steps 1 to 7, token by token, head by head."""
    batch, n = x.shape[:2]
    d, share = mixer.head_dim, mixer.heads // mixer.kv_heads

    def normed(t, weight):
        return t / (t.square().mean() + 1e-6).sqrt() * weight

    rows = []
    for b in range(batch):
        q, k, v = (layer(x[b]) for layer in (mixer.query, mixer.key, mixer.value))
        dt = mixer.worth(v)
        heads = []
        for h in range(mixer.heads):
            g = h // share
            own, shared = slice(h * d, (h + 1) * d), slice(g * d, (g + 1) * d)
            s = mixer.gain[g] * (1 + dt[:, g].exp()).log()
            s = s.exp() if mixer.bias == "exp" else s
            keys = [turned(normed(k[j, shared], mixer.key_norm.weight), j) for j in range(n)]
            out = []
            for i in range(n):
                query = turned(normed(q[i, own], mixer.query_norm.weight), i)
                may = [j for j in range(n) if mask is None or mask[b, j]]
                if mixer.topk == "row":
                    may = [j for j in may if j <= i]
                best = sorted(may, key=lambda j: -float(s[j].detach()))[: mixer.window]
                kept = [j for j in best if j <= i]
                if not kept:
                    out.append(torch.zeros(d, dtype=F64))
                    continue
                logits = torch.stack([query @ keys[j] / d**0.5 + s[j] for j in kept])
                out.append(logits.softmax(0) @ v[kept, shared])
            heads.append(torch.stack(out))
        rows.append(mixer.out(torch.cat(heads, 1)))
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "given",
    [{}, {"bias": "linear"}, {"topk": "global"}, {"qkv_bias": True, "kv_heads": 4}, {"window": 40}],
)
def test_equals_transcription(given, masked):
    mixer = build(**given)
    x = torch.randn(2, 21, 12, dtype=F64, requires_grad=True)
    mask = torch.rand(2, 21) < 0.7 if masked else None
    y, expected = mixer(x, mask=mask), transcription(mixer, x, mask)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    ours = torch.autograd.grad((y * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    torch.testing.assert_close(ours, theirs)
    for name, grad in zip(["x", *(n for n, _ in mixer.named_parameters())], ours, strict=True):
        assert bool(grad.any()), name  # the selector is trained through the keys that are kept


def test_a_wide_window_and_equal_keys_are_plain_causal_attention():
    mixer = build(window=30)
    with torch.no_grad():
        mixer.gain.zero_()
    x = torch.randn(2, 21, 12, dtype=F64)
    score = mixer.scores(mixer.value(x).unflatten(-1, (2, 6)).transpose(1, 2))
    assert torch.equal(score, torch.ones_like(score))
    positions = torch.arange(21, dtype=F64)[:, None] * 10000.0 ** (-2 * torch.arange(3, dtype=F64) / 6)
    query, key, value = mixer.project(x, positions)
    key, value = (t.repeat_interleave(2, 1) for t in (key, value))
    logits = (query @ key.mT * 6**-0.5).masked_fill(~Causal().mask(21), -torch.inf)
    expected = mixer.out((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x), expected)


def test_a_constant_added_to_all_scores_changes_nothing():
    mixer = build()
    query, key, value = torch.randn(2, 4, 25, 6, dtype=F64), *torch.randn(2, 2, 2, 25, 6, dtype=F64)
    score = torch.randn(2, 2, 25, dtype=F64)
    one, other = (mixer.attend(query, key, value, s, None) for s in (score, score + 3))
    torch.testing.assert_close(one, other)


def test_each_row_keeps_as_many_keys_as_fit():
    mixer = build()
    query, key = torch.randn(2, 4, 25, 6, dtype=F64), torch.randn(2, 2, 25, 6, dtype=F64)
    one_hot = torch.eye(25, dtype=F64).expand(2, 2, -1, -1)
    weights = mixer.attend(query, key, one_hot, torch.randn(2, 2, 25, dtype=F64), None)
    assert torch.equal((weights > 0).sum(-1)[0, 0], torch.arange(1, 26).clamp(max=4))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 25, dtype=F64))


def test_starts_as_a_sliding_window_that_can_learn():
    torch.manual_seed(0)
    mixer = DynamicMaskAttention(12, heads=2, window=3, dtype=F64)
    x = torch.randn(1, 20, 12, dtype=F64)
    base = mixer(x)
    changed = x.clone()
    changed[:, 5] += 1
    moved = (mixer(changed) - base).abs().amax((0, 2)) > 1e-12
    assert moved.nonzero()[:, 0].tolist() == [5, 6, 7]
    mixer(x).square().sum().backward()
    assert bool(mixer.gain.grad.any())


def test_the_state_keeps_one_score_a_key():
    mixer = build().eval()
    x = torch.randn(2, 21, 12, dtype=F64)
    _, state = mixer(x[:, :13], state=mixer.init_state(2))
    assert state.score.shape == (2, 2, 13)
    assert state.key.shape == (2, 2, 13, 6)
    parts = []
    for i in range(13, 21):
        y, state = mixer(x[:, i : i + 1], state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x)[:, 13:])


def test_parameter_counts():
    # Doge's layer at 1024 channels and 8 heads, 2 of them for keys: q, k, v, o, W_dt, A and two norms.
    mixer = DynamicMaskAttention(1024, heads=8, kv_heads=2, device="meta")
    assert sum(p.numel() for p in mixer.parameters()) == (
        2 * 1024**2 + 2 * 1024 * 256 + 2 * 256 + 2 + 2 * 128
    )


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="head_dim is 3"):
        DynamicMaskAttention(12, heads=4)
    with pytest.raises(ValueError, match="window is 0"):
        build(window=0)
    with pytest.raises(ValueError, match="bias is 'soft'"):
        build(bias="soft")
    with pytest.raises(ValueError, match="topk is 'all'"):
        build(topk="all")
    mixer = build(topk="global")
    assert not mixer.causal
    with pytest.raises(ValueError, match="topk is 'global'"):
        mixer.init_state(1)
    with pytest.raises(ValueError, match="state is given"):
        mixer(torch.zeros(1, 2, 12, dtype=F64), state=build().init_state(1))
