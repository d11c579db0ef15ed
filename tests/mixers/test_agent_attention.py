from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.agent_attention import (
    AgentAttention,
    AgentAttentionCSwin,
    AgentAttentionDeiT,
    AgentAttentionPVT,
)


def resizer(old: int, new: int) -> Tensor:
    """The matrix (new, old) of bilinear resizing along one axis, half-pixel centres."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        at = max(0.0, (i + 0.5) * old / new - 0.5)
        low = min(int(at), old - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, min(low + 1, old - 1)] += at - low
    return matrix


def transcription(m: AgentAttention, x: Tensor, size: tuple[int, int]) -> Tensor:
    """The card's steps on tokens (b, [1 +] h * w, c), with explicit pooling windows and softmax."""
    height, width = size
    ahead, d, p = x.shape[1] - height * width, m.dim // m.core.heads, math.isqrt(m.core.agents)
    q, k, v = ((x @ m.qkv.weight.T + m.qkv.bias)[..., i * m.dim : (i + 1) * m.dim] for i in range(3))
    grid = q[:, ahead:].unflatten(1, size)
    agents = []
    for i in range(p):
        for j in range(p):
            rows = slice(i * height // p, -(-(i + 1) * height // p))
            columns = slice(j * width // p, -(-(j + 1) * width // p))
            agents.append(grid[:, rows, columns].mean((1, 2)))
    a = torch.stack(agents, 1)

    old_h, old_w = m.core.ha_bias.shape[2], m.core.wa_bias.shape[3]
    table_h, table_w = resizer(7, height), resizer(7, width)
    rows, columns = resizer(old_h, height), resizer(old_w, width)
    outs = []
    for h in range(m.core.heads):
        bias1 = torch.einsum("ys,ast,xt->ayx", table_h, m.core.an_bias[h], table_w)
        bias1 = bias1 + (m.core.ah_bias[0, h, :, :, 0] @ rows.T)[:, :, None]
        bias1 = bias1 + (m.core.aw_bias[0, h, :, 0] @ columns.T)[:, None]
        bias2 = torch.einsum("ys,ast,xt->yxa", table_h, m.core.na_bias[h], table_w)
        bias2 = bias2 + (rows @ m.core.ha_bias[0, h, :, 0])[:, None]
        bias2 = bias2 + (columns @ m.core.wa_bias[0, h, 0])[None]
        bias1, bias2 = bias1.flatten(1), bias2.flatten(0, 1)
        if ahead:
            bias1 = torch.cat([m.core.ac_bias[0, h], bias1], 1)
            bias2 = torch.cat([m.core.ca_bias[0, h], bias2], 0)
        own = slice(h * d, (h + 1) * d)
        gather = (a[..., own] @ k[..., own].transpose(1, 2) / d**0.5 + bias1).exp()
        u = gather @ v[..., own] / gather.sum(-1, keepdim=True)
        read = (q[..., own] @ a[..., own].transpose(1, 2) / d**0.5 + bias2).exp()
        outs.append(read @ u / read.sum(-1, keepdim=True))
    y = torch.cat(outs, -1)
    image = F.pad(v[:, ahead:].unflatten(1, size), (0, 0, 1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            moved = image[:, i : i + height, j : j + width] * m.core.dwc.weight[:, 0, i, j]
            y = y + F.pad(moved.flatten(1, 2), (0, 0, ahead, 0))
    y = torch.cat([y[:, :ahead], y[:, ahead:] + m.core.dwc.bias], 1)
    return y @ m.proj.weight.T + m.proj.bias


def spread_biases(m: AgentAttention) -> AgentAttention:
    """Biases large enough that a wrong one shows."""
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.endswith("_bias"):
                p.normal_()
    return m


@pytest.mark.parametrize("size", [(5, 6), (4, 9), (2, 1)])  # the declared size, another, fewer than agents
def test_equals_transcription_with_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    m = spread_biases(AgentAttention(8, heads=2, agents=4, size=(5, 6), dtype=torch.float64))
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    literal = transcription(m, x.flatten(2).transpose(1, 2), size).transpose(1, 2).unflatten(2, size)
    torch.testing.assert_close(m(x), literal)
    wrt = (x, *m.parameters())
    up = torch.randn_like(x)
    for ours, theirs in zip(
        torch.autograd.grad(m(x), wrt, up), torch.autograd.grad(literal, wrt, up), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [None, (3, 8)])
def test_class_token_equals_transcription_with_gradients(size: tuple[int, int] | None) -> None:
    torch.manual_seed(1)
    m = spread_biases(AgentAttentionDeiT(8, heads=2, agents=9, size=(5, 4), dtype=torch.float64))
    grid = size or (5, 4)
    x = torch.randn(2, 1 + grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    literal = transcription(m, x, grid)
    torch.testing.assert_close(m(x, size=size), literal)
    wrt = (x, *m.parameters())
    up = torch.randn_like(x)
    for ours, theirs in zip(
        torch.autograd.grad(m(x, size=size), wrt, up), torch.autograd.grad(literal, wrt, up), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_constant_values_are_preserved() -> None:
    m = AgentAttention(8, heads=2, agents=4, size=(4, 4))
    with torch.no_grad():
        m.qkv.weight[16:] = 0
        m.core.dwc.weight.zero_()
        m.core.dwc.bias.zero_()
        m.proj.weight.copy_(torch.eye(8))
        m.proj.bias.zero_()
    torch.testing.assert_close(
        m(torch.randn(1, 8, 4, 4)), m.qkv.bias[16:].view(1, 8, 1, 1).expand(1, 8, 4, 4)
    )


def test_as_many_agents_as_tokens_is_two_full_attentions() -> None:
    m = AgentAttention(8, heads=2, agents=16, size=(4, 4), dtype=torch.float64)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.endswith("_bias") or name.startswith("core.dwc"):
                p.zero_()
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    q, k, v = m.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    first = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    second = (q @ q.transpose(-1, -2) / 2).softmax(-1)
    y = m.proj((second @ (first @ v)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x), y.transpose(1, 2).view(1, 8, 4, 4))


@pytest.mark.parametrize(("dim", "heads", "published"), [(192, 3, 6_015_640), (384, 6, 22_647_112)])
def test_parameter_count_of_agent_deit(dim: int, heads: int, published: int) -> None:
    mixer = AgentAttentionDeiT(dim, heads=heads, agents=49, size=(14, 14))
    own = sum(p.numel() for p in mixer.parameters())
    block = own + 4 * dim + (dim + 1) * 4 * dim + (4 * dim + 1) * dim  # two norms and the MLP
    patches, tokens, classes = (3 * 16 * 16 + 1) * dim, (1 + 197) * dim, (dim + 1) * 1000
    assert patches + tokens + 12 * block + 2 * dim + classes == published


def test_dropout_acts_in_training_alone() -> None:
    m, x = AgentAttention(8, heads=2, agents=4, size=(4, 4), dropout=0.5), torch.randn(1, 8, 4, 4)
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m(x))


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="agents is 5, must be a square"):
        AgentAttention(8, heads=2, agents=5)
    with pytest.raises(ValueError, match="heads is 3"):
        AgentAttention(8, heads=3)
    with pytest.raises(ValueError, match=r"size\[1\] is 0"):
        AgentAttention(8, heads=2, size=(4, 0))
    with pytest.raises(ValueError, match="size is"):
        AgentAttention(8, heads=2, size=(4,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x has 16 tokens, must have 17"):
        AgentAttentionDeiT(8, heads=2, size=(4, 4))(torch.zeros(1, 16, 8))


def assert_equal_with_gradients(y: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(y, expected)
    up = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(z, leaves, up) for z in (y, expected))
    torch.testing.assert_close(found, wanted)


def core_transcription(m, q: Tensor, k: Tensor, v: Tensor, size: tuple, seen: tuple) -> Tensor:
    """The steps of the core for queries of one map and keys of another: one head, one agent at a time."""
    (height, width), d, p = size, q.shape[-1] // m.heads, math.isqrt(m.agents)
    grid, (rows, columns) = q.unflatten(1, size), (resizer(seen[0], height), resizer(seen[1], width))
    outs = []
    for h in range(m.heads):
        own = slice(h * d, (h + 1) * d)
        total = 0.0
        reads, gathered = [], []
        for a in range(m.agents):
            i, j = divmod(a, p)
            cell = grid[
                :,
                i * height // p : -(-(i + 1) * height // p),
                j * width // p : -(-(j + 1) * width // p),
                own,
            ]
            agent = cell.mean((1, 2))

            def table(t, rows_t, columns_t, to):
                old_h, old_w = rows_t.numel(), columns_t.numel()
                body = resizer(7, to[0]) @ t @ resizer(7, to[1]).T
                return (
                    body
                    + (resizer(old_h, to[0]) @ rows_t.flatten())[:, None]
                    + (resizer(old_w, to[1]) @ columns_t.flatten())[None]
                ).flatten()

            bias1 = table(m.an_bias[h, a], m.ah_bias[0, h, a], m.aw_bias[0, h, a], seen)
            bias2 = table(m.na_bias[h, a], m.ha_bias[0, h, :, 0, a], m.wa_bias[0, h, 0, :, a], size)
            gather = ((k[..., own] * agent[:, None]).sum(-1) / d**0.5 + bias1).exp()
            gathered.append((gather[..., None] * v[..., own]).sum(1) / gather.sum(1, keepdim=True))
            reads.append(((q[..., own] * agent[:, None]).sum(-1) / d**0.5 + bias2).exp())
            total = total + reads[-1]
        outs.append(sum((r / total)[..., None] * u[:, None] for r, u in zip(reads, gathered, strict=True)))
    image = torch.einsum("ip,jq,bpqc->bijc", rows, columns, v.unflatten(1, seen))
    image = F.pad(image, (0, 0, 1, 1, 1, 1))
    local = m.dwc.bias + sum(
        image[:, i : i + height, j : j + width] * m.dwc.weight[:, 0, i, j] for i in range(3) for j in range(3)
    )
    return torch.cat(outs, -1) + local.flatten(1, 2)


@pytest.mark.parametrize(("size", "reduction"), [((4, 6), 2), ((5, 4), 2), ((3, 4), 1)])
def test_reduced_keys_equal_transcription(size: tuple[int, int], reduction: int) -> None:
    torch.manual_seed(2)
    m = spread_biases(
        AgentAttentionPVT(8, heads=2, agents=4, size=(4, 6), reduction=reduction, dtype=torch.float64)
    )
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    tokens = source = x.flatten(2).mT
    seen = (-(-size[0] // reduction), -(-size[1] // reduction))
    if reduction > 1:
        padded = F.pad(x, (0, seen[1] * 2 - size[1], 0, seen[0] * 2 - size[0]))
        small = sum(
            torch.einsum("dc,bcyx->byxd", m.sr.weight[:, :, i, j], padded[..., i::2, j::2])
            for i in range(2)
            for j in range(2)
        )
        small = (small + m.sr.bias).flatten(1, 2)
        centred = small - small.mean(-1, keepdim=True)
        source = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        source = source * m.norm.weight + m.norm.bias
    k, v = (source @ m.kv.weight.T + m.kv.bias).split(8, dim=-1)
    y = core_transcription(m.core, tokens @ m.q.weight.T + m.q.bias, k, v, size, seen)
    literal = (y @ m.proj.weight.T + m.proj.bias).mT.unflatten(2, size)
    assert_equal_with_gradients(m(x), literal, [x, *m.parameters()])


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_stripes_equal_transcription(size: tuple[int, int]) -> None:
    torch.manual_seed(3)
    m = spread_biases(AgentAttentionCSwin(8, heads=2, agents=4, size=(4, 6), stripe=2, dtype=torch.float64))
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    qkv = (torch.einsum("dc,bcyx->byxd", m.qkv.weight, x) + m.qkv.bias).split(8, dim=-1)
    halves = []
    for half, core in enumerate((m.upright, m.level)):
        parts = []
        for start in range(0, size[1 - half], 2):
            cut = [t[..., 4 * half : 4 * half + 4] for t in qkv]
            cut = [t[:, :, start : start + 2] if half == 0 else t[:, start : start + 2] for t in cut]
            own = tuple(cut[0].shape[1:3])
            y = core_transcription(core, *(t.flatten(1, 2) for t in cut), own, own)
            parts.append(y.unflatten(1, own))
        halves.append(torch.cat(parts, dim=2 - half))
    literal = (torch.cat(halves, -1) @ m.proj.weight.T + m.proj.bias).permute(0, 3, 1, 2)
    assert_equal_with_gradients(m(x), literal, [x, *m.parameters()])


@pytest.mark.door
def test_errors_of_the_other_placements() -> None:
    with pytest.raises(ValueError, match="reduction is 0"):
        AgentAttentionPVT(8, heads=2, agents=4, reduction=0)
    with pytest.raises(ValueError, match="heads is 1, must be even"):
        AgentAttentionCSwin(8, heads=1, agents=4)
    with pytest.raises(ValueError, match="stripe is 0"):
        AgentAttentionCSwin(8, heads=2, agents=4, stripe=0)


@pytest.mark.parametrize(
    ("depths", "published"),
    [
        ((2, 2, 2, 2), 11_570_352),
        ((3, 4, 6, 3), 20_635_066),
        ((3, 4, 18, 3), 35_921_746),
        ((3, 8, 27, 3), 48_738_180),
    ],
)
def test_parameter_count_of_agent_pvt(depths: tuple[int, ...], published: int) -> None:
    total, before, patch = 0, 3, 4
    stages = zip(depths, (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (9, 16, 49, 49), strict=True)
    for stage, (depth, dim, heads, ratio, agents) in enumerate(stages):
        side = 56 >> stage
        mixer = AgentAttentionPVT(dim, heads=heads, agents=agents, size=(side, side), device="meta")
        mlp = (dim + 1) * ratio * dim + (ratio * dim + 1) * dim
        total += depth * (sum(p.numel() for p in mixer.parameters()) + mlp + 4 * dim)
        total += patch * patch * before * dim + 3 * dim + side * side * dim  # patches, their norm, places
        before, patch = dim, 2
    assert total + 513 * 1000 == published
