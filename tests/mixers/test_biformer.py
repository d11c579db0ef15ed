from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.biformer import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention


def split(m: BiLevelRoutingAttention, x: Tensor) -> list[Tensor]:
    """q, k, v of a channels-last map."""
    y = x @ m.qkv.weight.T + m.qkv.bias
    return [y[..., : m.qk_dim], y[..., m.qk_dim : 2 * m.qk_dim], y[..., 2 * m.qk_dim :]]


def pad(x: Tensor, height: int, width: int) -> Tensor:
    full = x.new_zeros(len(x), height, width, x.shape[-1])
    full[:, : x.shape[1], : x.shape[2]] = x
    return full


def transcription(m: BiLevelRoutingAttention, x: Tensor, *, pad_first: bool) -> tuple[Tensor, list]:
    """One region, one head at a time; channels first in and out. Also the picked regions."""
    x = x.permute(0, 2, 3, 1)
    height, width = x.shape[1:3]
    p = m.regions
    if pad_first:
        x = pad(x, -(-height // p) * p, -(-width // p) * p)
    rh, rw = x.shape[1] // p, x.shape[2] // p
    q, k, v = split(m, x)
    corners = [(i, j) for i in range(0, x.shape[1], rh) for j in range(0, x.shape[2], rw)]

    def region(t: Tensor, corner: tuple[int, int]) -> Tensor:
        cut = t[:, corner[0] : corner[0] + rh, corner[1] : corner[1] + rw]
        return cut.reshape(len(t), -1, t.shape[-1])

    q_mean = torch.stack([region(q, c).mean(1) for c in corners], 1)
    k_mean = torch.stack([region(k, c).mean(1) for c in corners], 1)
    picks = []
    for b in range(len(x)):
        scores = [[float(a @ z) for z in k_mean[b].detach()] for a in q_mean[b].detach()]
        picks.append([sorted(range(len(corners)), key=lambda s: -row[s])[: m.topk] for row in scores])
    full = (-(-x.shape[1] // rh) * rh, -(-x.shape[2] // rw) * rw)
    q, k, v = (pad(t, *full) for t in (q, k, v))
    out = torch.zeros_like(v)
    for b, rows in enumerate(picks):
        for corner, row in zip(corners, rows, strict=True):
            one = slice(b, b + 1)
            queries = region(q[one], corner)[0]
            keys = torch.cat([region(k[one], corners[s])[0] for s in row])
            values = torch.cat([region(v[one], corners[s])[0] for s in row])
            heads = []
            for h in range(m.heads):
                dq, dv = m.qk_dim // m.heads, m.dim // m.heads
                logits = queries[:, h * dq : (h + 1) * dq] @ keys[:, h * dq : (h + 1) * dq].T / m.qk_dim**0.5
                weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
                heads.append(weights @ values[:, h * dv : (h + 1) * dv])
            i, j = corner
            out[b, i : i + rh, j : j + rw] = torch.cat(heads, -1).view(rh, rw, -1)
    out = out + F.conv2d(
        v.permute(0, 3, 1, 2), m.lepe.weight, m.lepe.bias, padding=m.lepe.weight.shape[-1] // 2, groups=m.dim
    ).permute(0, 2, 3, 1)
    out = out @ m.out.weight.T + m.out.bias
    return out[:, :height, :width].permute(0, 3, 1, 2), picks


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (3, 8)])
@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
def test_equals_transcription_with_gradients(kind: type, size: tuple[int, int]) -> None:
    torch.manual_seed(sum(size))
    m = kind(8, heads=2, regions=3, topk=2, qk_dim=12, lepe_kernel=5, dtype=torch.float64)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    literal, picks = transcription(m, x, pad_first=kind is BiLevelRoutingAttention)
    assert m.route(x).tolist() == picks
    torch.testing.assert_close(m(x), literal)
    wrt = (x, *m.parameters())
    up = torch.randn_like(x)
    for ours, theirs in zip(
        torch.autograd.grad(m(x), wrt, up), torch.autograd.grad(literal, wrt, up), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_all_regions_picked_is_full_attention() -> None:
    m = BiLevelRoutingAttention(16, heads=4, regions=3, topk=9, dtype=torch.float64)
    x = torch.randn(2, 16, 6, 9, dtype=torch.float64)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (4, 4)).transpose(1, 2) for t in split(m, x.permute(0, 2, 3, 1)))
    y = F.scaled_dot_product_attention(q, k, v, scale=16**-0.5).transpose(1, 2).flatten(2)
    lepe = m.lepe(v.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (6, 9)))
    y = m.out(y.unflatten(1, (6, 9)) + lepe.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(m(x), y)


def test_regions_that_pick_themselves_are_windows() -> None:
    m = BiLevelRoutingAttention(8, heads=2, regions=2, topk=1, dtype=torch.float64)
    with torch.no_grad():  # q = k = v = x
        m.qkv.weight.copy_(torch.eye(8).repeat(3, 1))
        m.qkv.bias.zero_()
    x = 0.1 * torch.randn(1, 8, 4, 6, dtype=torch.float64)
    for r in range(4):  # every region is marked in a channel of its own
        x[:, r, r // 2 * 2 : r // 2 * 2 + 2, r % 2 * 3 : r % 2 * 3 + 3] += 3
    assert m.route(x).flatten().tolist() == [0, 1, 2, 3]
    windows = x.permute(0, 2, 3, 1).unflatten(2, (2, 3)).unflatten(1, (2, 2)).transpose(2, 3).reshape(4, 6, 8)
    t = windows.unflatten(-1, (2, 4)).transpose(1, 2)
    y = F.scaled_dot_product_attention(t, t, t, scale=8**-0.5).transpose(1, 2).reshape(2, 2, 2, 3, 8)
    y = y.transpose(1, 2).reshape(1, 4, 6, 8) + m.lepe(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(m(x), m.out(y).permute(0, 3, 1, 2))


def test_the_two_modules_agree_where_regions_divide_and_only_there() -> None:
    legacy, nchw = (
        kind(16, heads=4, regions=3, topk=2, dtype=torch.float64)
        for kind in (BiLevelRoutingAttention, NCHWBiLevelRoutingAttention)
    )
    nchw.load_state_dict(legacy.state_dict())
    x = torch.randn(2, 16, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(legacy(x), nchw(x))
    x = torch.randn(2, 16, 7, 8, dtype=torch.float64)
    assert not torch.allclose(legacy(x), nchw(x))
    assert legacy.route(x).shape == (2, 9, 2)
    assert nchw.route(x).shape == (2, 4 * 4, 2)


@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (13, 4)])
def test_any_size_runs(kind: type, size: tuple[int, int]) -> None:
    y = kind(16, heads=4, regions=3, topk=4)(torch.randn(1, 16, *size))
    assert y.shape == (1, 16, *size)
    assert y.isfinite().all()


def test_parameter_count() -> None:
    m = BiLevelRoutingAttention(64, heads=2, qk_dim=32, lepe_kernel=5)
    assert sum(p.numel() for p in m.parameters()) == (64 + 1) * (32 + 32 + 64) + 64 * 26 + 65 * 64
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {
        "qkv.weight": (128, 64),
        "qkv.bias": (128,),
        "lepe.weight": (64, 1, 5, 5),
        "lepe.bias": (64,),
        "out.weight": (64, 64),
        "out.bias": (64,),
    }


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="topk is 5, must be at most"):
        BiLevelRoutingAttention(16, heads=4, regions=2, topk=5)
    with pytest.raises(ValueError, match="heads is 3, must divide dim"):
        BiLevelRoutingAttention(16, heads=3)
    with pytest.raises(ValueError, match="heads is 4, must divide qk_dim"):
        BiLevelRoutingAttention(16, heads=4, qk_dim=6)
    with pytest.raises(ValueError, match="lepe_kernel is 4"):
        BiLevelRoutingAttention(16, heads=4, lepe_kernel=4)
    with pytest.raises(ValueError, match="x has shape"):
        BiLevelRoutingAttention(16, heads=4).route(torch.zeros(1, 8, 3, 3))
