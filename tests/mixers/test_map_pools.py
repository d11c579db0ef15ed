"""Pools of maps: CLIP's and CBAM's, each against a transcription."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.pooling.cbam_pool import CBAMPool
from heedful.mixers.pooling.clip_pool import CLIPPool


def drawn(pool):
    torch.manual_seed(0)
    pool.double().eval()
    for name, value in pool.state_dict().items():
        if value.is_floating_point():
            value.normal_(std=0.7)
            if name.endswith("running_var"):
                value.abs_().add_(0.3)
    return pool


def compare(pool, x, expected):
    torch.testing.assert_close(pool(x), expected)
    up, of = torch.randn_like(expected), (x, *pool.parameters())
    ours, theirs = (torch.autograd.grad((y * up).sum(), of) for y in (pool(x), expected))
    torch.testing.assert_close(ours, theirs)


def test_clip_equals_transcription():
    pool = drawn(CLIPPool(8, heads=2, size=(2, 3)))
    x = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = []
    for image in x:
        tokens = [image[:, i, j] for i in range(2) for j in range(3)]
        u = torch.stack([sum(tokens) / 6, *tokens]) + pool.pos_embed
        q, k, v = (u @ pool.qkv.weight.T + pool.qkv.bias).split(8, -1)
        heads = []
        for own in (slice(0, 4), slice(4, 8)):
            weights = (k[:, own] @ q[0, own] / 2).exp()
            heads.append(weights @ v[:, own] / weights.sum())
        rows.append(pool.proj.weight @ torch.cat(heads) + pool.proj.bias)
    compare(pool, x, torch.stack(rows))


def test_positions_of_clip_are_interpolated():
    pool = drawn(CLIPPool(8, heads=2, size=(2, 3)))
    with torch.no_grad():  # the same position everywhere is that also on another map
        pool.pos_embed[1:] = pool.pos_embed[1:2].clone()
        x = torch.randn(1, 8, 4, 3, dtype=torch.float64)
        y = pool(x)
        other = CLIPPool(8, heads=2, size=(4, 3)).double()
        state = {**pool.state_dict(), "pos_embed": pool.pos_embed[[0] + [1] * 12]}
        other.load_state_dict(state)
        torch.testing.assert_close(y, other(x))


def test_cbam_equals_transcription():
    pool = drawn(CBAMPool(6, ratio=0.5, kernel=3))
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    rows = []
    for image in x:
        flat = image.flatten(1)
        hidden = [(pool.fc1.weight @ v).clamp(min=0) for v in (flat.mean(1), flat.max(1).values)]
        gate = 1 / (1 + (-(pool.fc2.weight @ (hidden[0] + hidden[1]))).exp())
        a = image * gate[:, None, None]
        places = torch.stack([a.mean(0), a.max(0).values])
        padded = torch.zeros(2, 6, 7, dtype=torch.float64)
        padded[:, 1:5, 1:6] = places
        y = torch.zeros(6, dtype=torch.float64)
        for i in range(4):
            for j in range(5):
                score = (pool.conv.weight[0] * padded[:, i : i + 3, j : j + 3]).sum()
                bn = pool.bn
                score = (score - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias
                y = y + (image[:, i, j] + a[:, i, j] / (1 + (-score).exp())).clamp(min=0) / 20
        rows.append(y)
    compare(pool, x, torch.stack(rows))


def test_parameters():
    assert sum(p.numel() for p in CLIPPool(8, heads=2, size=(2, 3)).parameters()) == 7 * 8 + 4 * 64 + 32
    assert sum(p.numel() for p in CBAMPool(768).parameters()) == 2 * 768 * 48 + 2 * 49 + 2
    for cls in (CLIPPool, CBAMPool):
        pool = cls(**cls.example)
        assert pool(**pool.example_inputs()).shape == (2, 16)
        assert pool(torch.randn(1, 16, 1, 7)).isfinite().all()


@pytest.mark.door
def test_errors():
    for call, message in (
        (lambda: CLIPPool(8, heads=3), "heads is 3, must divide dim"),
        (lambda: CLIPPool(8, heads=2, size=(0, 2)), "size is 0"),
        (lambda: CBAMPool(8, kernel=4), "kernel is 4, must be odd"),
        (lambda: CBAMPool(8)(torch.zeros(1, 4, 8)), "x has shape"),
        (lambda: CLIPPool(8, heads=2)(torch.zeros(1, 4, 8, 8)), "x has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
