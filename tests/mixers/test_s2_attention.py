"""S2-Attention: a literal transcription, dense attention at stride 1, the state of shards."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.sparse.s2_attention import S2Attention


def literal(mixer, x, size, local, stride, dense=0):
    """Head by head with a mask made by loops over the card."""
    b, n, _ = x.shape
    d, kv_heads = mixer.head_dim, mixer.kv_heads
    repeats, step = mixer.heads // kv_heads, max(1, int(stride / mixer.heads))
    q, k, v = (layer(x).view(b, n, -1, d).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
    heads = []
    for h in range(mixer.heads):
        g = h // repeats
        seen = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            for j in range(n):
                far = i // size - j // size
                if mixer.causal:
                    shard = (j // size + g * step) % stride == 0 or g >= kv_heads - dense
                    seen[i, j] = j <= i and (far < local or shard)
                else:
                    seen[i, j] = (max(far - local + 1, 0) + max(-far - local + 1, 0)) % stride == 0
        logits = (q[:, h] @ k[:, g].mT / d**0.5).masked_fill(~seen, -torch.inf)
        heads.append(logits.softmax(-1) @ v[:, g])
    return mixer.out(torch.cat(heads, -1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("size", "local", "stride"), [(1, 1, 4), (3, 2, 2), (4, 1, 3)])
def test_equals_the_card(causal, size, local, stride):
    mixer = S2Attention(
        16,
        heads=4,
        kv_heads=2,
        causal=causal,
        block_size=size,
        local_blocks=local,
        stride=stride,
        dense_heads=int(causal and stride == 3),
        dtype=torch.float64,
    )
    x = torch.randn(2, 23, 16, dtype=torch.float64, requires_grad=True)
    ours, expected = mixer(x), literal(mixer, x, size, local, stride, int(stride == 3))
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    for grad, want in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, want)


def test_stride_one_is_dense():
    ours = S2Attention(16, heads=4, block_size=2, local_blocks=1, stride=1, rotary=True)
    dense = SelfAttention(16, heads=4, causal=True, rotary=True)
    dense.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 19, 16)
    torch.testing.assert_close(ours(x), dense(x))
    assert sum(p.numel() for p in ours.parameters()) == 4 * (16 * 16 + 16)


def test_all_heads_together_see_every_token():
    """With `stride` heads every earlier token moves the output; with fewer some do not."""
    for heads, covered in ((4, True), (2, False)):
        mixer = S2Attention(8, heads=heads, block_size=2, local_blocks=1, stride=4, dtype=torch.float64)
        if heads == 2:
            mixer.shards = mixer.pattern = type(mixer.shards)(2, 1, 2, 1, 4, step=1)
        x = torch.randn(1, 32, 8, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(mixer(x)[0, -1].square().sum(), x)
        assert bool((grad[0].abs().amax(-1) > 0).all()) == covered


def test_state_holds_shards_alone():
    mixer = S2Attention(16, heads=4, block_size=2, local_blocks=2, stride=4, rotary=True, dtype=torch.float64)
    x = torch.randn(2, 61, 16, dtype=torch.float64)
    mask = torch.ones(2, 61, dtype=torch.bool)
    mask[0, :7] = False
    whole = mixer(x, mask=mask)
    state, pieces = mixer.init_state(2), []
    for start, stop in ((0, 20), (20, 21), (21, 33), (33, 34), (34, 61)):
        y, state = mixer(x[:, start:stop], mask=mask[:, start:stop], state=state)
        pieces.append(y)
        blocks = -(-stop // 2)
        assert state.key.shape[2] <= 2 * (2 + blocks // 4 + 1)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask], whole[mask])
    # Block 30 is the query's next; of each head: block 30 (half full), block 29, and a quarter of the rest.
    kept = mixer.kept(61, x.device)
    for head, row in enumerate(kept.tolist()):
        wanted = [j for j in range(61) if j // 2 > 28 or (j // 2 + head) % 4 == 0]
        assert [j for j in row if j < 61] == wanted
    assert state.key.shape[2] < 61 / 2


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="dense_heads is 1, must be 0 unless causal"):
        S2Attention(16, heads=4, causal=False, dense_heads=1)
    with pytest.raises(ValueError, match="causal is False, must be True to decode"):
        S2Attention(16, heads=4, causal=False).init_state(1)
