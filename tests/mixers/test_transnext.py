"""TransNeXt's two attentions and its feed-forward net, place by place."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.conv_glu import ConvGLU
from heedful.mixers.grid.transnext import AggregatedAttention, GlobalCosineAttention
from heedful.ops.foveal import inside


def spread(mixer: torch.nn.Module) -> None:
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def same_with_gradients(mixer: torch.nn.Module, x: Tensor, literal: Tensor) -> None:
    y = mixer(x)
    torch.testing.assert_close(y, literal)
    wrt, up = (x, *mixer.parameters()), torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(z, wrt, up, allow_unused=True) for z in (y, literal))
    for name, a, b in zip(["x", *(n for n, _ in mixer.named_parameters())], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda told, name=name: f"gradient of {name}: {told}")


def unit(t: Tensor) -> Tensor:
    return t / t.square().sum(-1, keepdim=True).sqrt()


def position(mixer, place, centre, trained) -> Tensor:
    """The bias of every head for one pair."""
    offset = []
    for axis in range(2):
        t = (place[axis] - centre[axis]) / (trained[axis] - 1) * 8
        offset.append(math.copysign(math.log(abs(t) + 1) / math.log(8), t))
    hidden = mixer.position_in.weight @ mixer.proj.weight.new_tensor(offset) + mixer.position_in.bias
    return mixer.position_out.weight @ hidden.clamp(min=0) + mixer.position_out.bias


@pytest.mark.parametrize("trained", [None, (5, 7)])
def test_global_attention_equals_transcription(trained: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    mixer = GlobalCosineAttention(9, heads=3, trained_size=trained, dtype=torch.float64)
    spread(mixer)
    x = torch.randn(1, 9, 3, 4, dtype=torch.float64, requires_grad=True)
    places = [(i, j) for i in range(3) for j in range(4)]
    tokens = torch.stack([x[0, :, i, j] for i, j in places])
    q, k, v = (tokens @ mixer.qkv.weight.T + mixer.qkv.bias).split(9, -1)
    rows = []
    for n, place in enumerate(places):
        bias = torch.stack([position(mixer, place, other, trained or (3, 4)) for other in places])
        heads = []
        for h, own in enumerate((slice(0, 3), slice(3, 6), slice(6, 9))):
            query = unit(q[n, own]) + mixer.query_embedding[h, 0]
            logits = (unit(k[:, own]) @ query) * (1 + mixer.temperature[h, 0, 0].exp()).log() * math.log(12)
            weight = (logits + bias[:, h]).exp()
            heads.append(weight @ v[:, own] / weight.sum())
        rows.append(mixer.proj.weight @ torch.cat(heads) + mixer.proj.bias)
    same_with_gradients(mixer, x, torch.stack(rows).T.reshape(1, 9, 3, 4))


def test_aggregated_attention_equals_transcription() -> None:
    """A map that the ratio does not divide: cells of adaptive pooling overlap."""
    torch.manual_seed(0)
    mixer = AggregatedAttention(4, heads=2, pool_ratio=2, trained_size=(6, 9), dtype=torch.float64)
    spread(mixer)
    height, width = 5, 4
    x = torch.randn(1, 4, height, width, dtype=torch.float64, requires_grad=True)
    places = [(i, j) for i in range(height) for j in range(width)]
    token = {(i, j): x[0, :, i, j] for i, j in places}

    def keys_values(t: Tensor) -> tuple[Tensor, Tensor]:
        both = mixer.kv.weight @ t + mixer.kv.bias
        return unit(both[:4].view(2, 2)), both[4:].view(2, 2)

    cells = []
    for rows in ((0, 1, 2), (2, 3, 4)):
        for columns in ((0, 1), (2, 3)):
            under = [token[i, j] for i in rows for j in columns]
            mean = sum(F.gelu(mixer.reduce.weight @ t + mixer.reduce.bias) for t in under) / len(under)
            mean = mean - mean.mean()
            mean = mean / (mean.square().mean() + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
            centre = (sum(rows) / len(rows), sum(columns) / len(columns))
            cells.append((centre, *keys_values(mean)))
    y = []
    for i, j in places:
        q = unit((mixer.query.weight @ token[i, j] + mixer.query.bias).view(2, 2))
        near = [(w, (i + w // 3 - 1, j + w % 3 - 1)) for w in range(9)]
        near = [(w, *keys_values(token[at])) for w, at in near if at in token]
        heads = []
        for h in range(2):
            scale = (1 + mixer.temperature[h, 0, 0].exp()).log() * math.log(len(near) + len(cells))
            query = (q[h] + mixer.query_embedding[h, 0]) * scale
            local = [(query @ k[h] + mixer.local_bias[h, w]).exp() for w, k, _ in near]
            coarse = [(query @ k[h] + position(mixer, (i, j), c, (6, 9))[h]).exp() for c, k, _ in cells]
            total = sum(local) + sum(coarse)
            out = sum(a / total * v[h] for a, (_, _, v) in zip(coarse, cells, strict=True))
            for a, (w, _, v) in zip(local, near, strict=True):
                out = out + (a / total + q[h] @ mixer.tokens[h, :, w] + mixer.token_bias[h, 0, w]) * v[h]
            heads.append(out)
        y.append(mixer.proj.weight @ torch.cat(heads) + mixer.proj.bias)
    same_with_gradients(mixer, x, torch.stack(y).T.reshape(1, 4, height, width))


def test_weights_sum_to_1_but_for_what_is_learned_beside_the_softmax() -> None:
    torch.manual_seed(0)
    mixer = AggregatedAttention(8, heads=2, dtype=torch.float64)
    with torch.no_grad():  # all values are the same
        mixer.kv.weight[8:] = 0
        mixer.kv.bias[8:] = torch.arange(8.0)
        mixer.tokens.zero_()
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    same = mixer.proj.weight @ torch.arange(8.0, dtype=torch.float64) + mixer.proj.bias
    torch.testing.assert_close(mixer(x), same[:, None, None].expand(1, 8, 6, 6))
    torch.nn.init.ones_(mixer.token_bias)  # each neighbour once more
    inner, corner = mixer(x)[0, :, 2, 2], mixer(x)[0, :, 0, 0]
    torch.testing.assert_close(inner - mixer.proj.bias, 10 * (same - mixer.proj.bias))
    torch.testing.assert_close(corner - mixer.proj.bias, 5 * (same - mixer.proj.bias))


def test_neighbours_inside_of_the_map() -> None:
    count = inside((4, 5), 3, None).sum(1).view(4, 5)
    assert (int(count[0, 0]), int(count[0, 2]), int(count[2, 2])) == (4, 6, 9)


def test_temperature_starts_at_its_published_value() -> None:
    for kind in (AggregatedAttention, GlobalCosineAttention):
        torch.testing.assert_close(F.softplus(kind(8).temperature), torch.full((8, 1, 1), 1 / 0.24))


def test_conv_glu_equals_transcription() -> None:
    torch.manual_seed(0)
    mixer = ConvGLU(3, hidden=8, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    a, v = (x.movedim(1, -1) @ mixer.fc1.weight.T + mixer.fc1.bias).split(5, -1)
    gate = torch.zeros_like(a) + mixer.dwconv.bias
    padded = F.pad(a, (0, 0, 1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            gate = gate + padded[:, i : i + 4, j : j + 5] * mixer.dwconv.weight[:, 0, i, j]
    gate = gate * (1 + torch.erf(gate / 2**0.5)) / 2
    literal = ((gate * v) @ mixer.fc2.weight.T + mixer.fc2.bias).movedim(-1, 1)
    same_with_gradients(mixer, x, literal)


def test_parameters() -> None:
    positions = 2 * 512 + 512 + 512 * 3 + 3
    first = AggregatedAttention(72, heads=3, device="meta")
    local = 3 * 9 + 3 * 24 * 9 + 3 * 9
    shared = 3 + 3 * 24 + positions
    assert sum(p.numel() for p in first.parameters()) == 5 * 72 * 73 + 2 * 72 + local + shared
    last = GlobalCosineAttention(72, heads=3, device="meta")
    assert sum(p.numel() for p in last.parameters()) == 4 * 72 * 73 + shared
    glu = ConvGLU(12, hidden=24)
    assert sum(p.numel() for p in glu.parameters()) == 13 * 32 + 10 * 16 + 17 * 12


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="window is 4, must be odd"):
        AggregatedAttention(8, window=4)
    with pytest.raises(ValueError, match="pool_ratio is 0"):
        AggregatedAttention(8, pool_ratio=0)
    with pytest.raises(ValueError, match="hidden is 1, must be at least 2"):
        ConvGLU(8, hidden=1)
