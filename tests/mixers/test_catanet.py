from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.mixers.grid.catanet import LocalRegionSelfAttention, TokenAggregationBlock
from heedful.routing.centres import chunk_centres, next_centres, reflected


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def ffn(m: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    z = gelu(x @ m.fc1.weight.T + m.fc1.bias)
    near = F.conv2d(z.T.view(1, -1, *size), m.dwconv.weight, m.dwconv.bias, padding=2, groups=z.shape[1])
    return (z + gelu(near[0].flatten(1).T)) @ m.fc2.weight.T + m.fc2.bias


def softmax_sum(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    weight = (keys @ q / len(q) ** 0.5).exp()
    return (weight / weight.sum()) @ values


def stepped(tokens: Tensor, centres: Tensor) -> Tensor:
    """Every token of every image to its nearest centre; sums at length 1."""
    rows = [c for c in centres]
    owners = [int((centres @ t).argmax()) for t in tokens]
    for j in range(len(rows)):
        if own := [t for t, o in zip(tokens, owners, strict=True) if o == j]:
            total = torch.stack(own).sum(0)
            rows[j] = total / total.norm()
    return torch.stack(rows)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def tab(m: TokenAggregationBlock, x: Tensor, started: bool, stored: Tensor) -> tuple[Tensor, Tensor]:
    """One image, one sorted token, one head at a time; also the centres."""
    images = [image.flatten(1).T for image in x]
    normed = [layer_norm(m.norm, image) for image in images]
    n, count = len(images[0]), len(stored)
    centres = stored
    if not started:
        pad = count - n % count
        filled = [torch.cat([t, t[n - pad :].flip(0)]) for t in normed]
        size = len(filled[0]) // count
        centres = torch.stack(
            [torch.cat([t[j * size : (j + 1) * size] for t in filled]).mean(0) for j in range(count)]
        )
    if m.training:
        centres = centres.detach()
        tokens = torch.cat([unit(t) for t in normed])
        for _ in range(m.iterations - 1):
            centres = stepped(tokens.detach(), unit(centres))
        centres = stepped(tokens, unit(centres))
    p, gs = m.attention, min(n, m.group_size)
    out = []
    for image, t in zip(images, normed, strict=True):
        owners = [int((unit(centres) @ unit(token)).argmax()) for token in t]
        order = sorted(range(n), key=lambda i: owners[i])  # stable
        groups = math.ceil(n / gs)
        pad = groups * gs - n
        filled = order + order[n - pad - gs :][::-1]
        rows: dict[int, Tensor] = {}
        for place, i in enumerate(order):
            window = t[torch.tensor(filled[place // gs * gs : (place // gs + 2) * gs])]
            heads = []
            for h in range(p.heads):
                qk = slice(h * m.qk_dim, (h + 1) * m.qk_dim)
                v = slice(h * m.v_dim, (h + 1) * m.v_dim)
                q = p.query.weight[qk] @ t[i]
                near = softmax_sum(q, window @ p.key.weight[qk].T, window @ p.value.weight[v].T)
                far = softmax_sum(
                    q, centres @ m.centre_key.weight[qk].T, centres @ m.centre_value.weight[v].T
                )
                heads.append(near + far)
            rows[i] = m.mix.weight @ (p.proj.weight @ torch.cat(heads))
        image = image + torch.stack([rows[i] for i in range(n)])
        image = image + ffn(m.ffn, layer_norm(m.ffn_norm, image), x.shape[2:])
        out.append(image.T.unflatten(1, x.shape[2:]))
    return torch.stack(out), centres


def block(**how) -> TokenAggregationBlock:
    torch.manual_seed(0)
    options = {"heads": 2, "qk_dim": 6, "mlp_dim": 10, "centres": 3, "group_size": 8, "iterations": 3}
    m = TokenAggregationBlock(8, **{**options, **how}, dtype=torch.float64).eval()
    for p in m.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    m.qk_dim, m.v_dim = 3, 4  # of a head, for the transcription
    return m


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [(4, 5), (4, 6), (6, 4)])  # 20: filled groups; 24: none to fill
def test_tokens_equal_transcription_with_gradients(size, train, started):
    m = block(decay=0.9).train(train)
    m.started.fill_(started)
    stored = m.centres.clone()
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    ours = m(x)
    wanted, centres = tab(m, x, started, stored)
    torch.testing.assert_close(ours, wanted)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(wanted, wrt, up))
    if train:
        moved = 0.9 * stored + 0.1 * centres if started else centres
        torch.testing.assert_close(m.centres, moved.detach())
        assert bool(m.started)
    else:
        assert torch.equal(m.centres, stored) and bool(m.started) == started


def test_one_group_is_full_attention():
    """Every token stands twice among the keys: the softmax is that over each once."""
    m = block(group_size=64)
    m.started.fill_(True)
    x = torch.randn(1, 8, 3, 5, dtype=torch.float64)
    t = m.norm(x.flatten(2).mT)
    p = m.attention
    q, k, v = (p.split(w(t)) for w in (p.query, p.key, p.value))
    kg, vg = (p.split(w(m.centres[None])) for w in (m.centre_key, m.centre_value))
    y = F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, kg, vg)
    tokens = x.flatten(2).mT + m.mix(p.proj(y.transpose(1, 2).flatten(2)))
    tokens = tokens + m.ffn(m.ffn_norm(tokens), (3, 5))
    torch.testing.assert_close(m(x), tokens.mT.unflatten(2, (3, 5)))


def test_places_turn_back_at_the_ends():
    assert reflected(3, 9).tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2]


def test_centres_without_tokens_stay():
    x = torch.tensor([[[3.0, 0.0], [4.0, 0.1], [0.0, 2.0]]], dtype=torch.float64)
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    wanted = torch.stack([unit(x[0, 0] + x[0, 1]), unit(x[0, 2]), centres[2]])
    torch.testing.assert_close(next_centres(x, centres), wanted)


def test_first_centres_of_a_whole_number_of_chunks_are_filled_up_too():
    x = torch.arange(6.0).view(1, 6, 1)  # 6 tokens, 3 centres: 3 more, the last ones turned round
    torch.testing.assert_close(chunk_centres(x, 3)[:, 0], torch.tensor([1.0, 4.0, 4.0]))


def lrsa(m: LocalRegionSelfAttention, image: Tensor) -> Tensor:
    """Patch by patch, summed; then the overlapped rows and columns are halved."""
    p, (_, height, width), step = m.attention, image.shape, m.patch - 2
    rows, columns = (
        [min(i, side - m.patch) for i in range(0, side + step - m.patch, step)] for side in (height, width)
    )
    total = torch.zeros_like(image)
    for top in rows:
        for left in columns:
            part = image[:, top : top + m.patch, left : left + m.patch].flatten(1).T
            t = layer_norm(m.norm, part)
            tokens = []
            for i in range(len(t)):
                heads = []
                for h in range(p.heads):
                    qk, v = slice(3 * h, 3 * h + 3), slice(4 * h, 4 * h + 4)
                    q = p.query.weight[qk] @ t[i]
                    heads.append(softmax_sum(q, t @ p.key.weight[qk].T, t @ p.value.weight[v].T))
                tokens.append(part[i] + p.proj.weight @ torch.cat(heads))
            mixed = torch.stack(tokens).T.unflatten(1, (m.patch, m.patch))
            total = total + F.pad(mixed, (left, width - left - m.patch, top, height - top - m.patch))
    factor = torch.ones(height, width, dtype=image.dtype)
    for i, top in zip(range(step, height + step - m.patch, step), rows[1:], strict=True):
        factor[top : i + 2] /= 2
    for j, left in zip(range(step, width + step - m.patch, step), columns[1:], strict=True):
        factor[:, left : j + 2] /= 2
    tokens = (total * factor).flatten(1).T
    tokens = tokens + ffn(m.ffn, layer_norm(m.ffn_norm, tokens), (height, width))
    return tokens.T.unflatten(1, (height, width))


@pytest.mark.parametrize("size", [(5, 5), (5, 8), (9, 11), (7, 6)])
def test_patches_equal_transcription_with_gradients(size):
    torch.manual_seed(0)
    m = LocalRegionSelfAttention(8, patch=5, heads=2, qk_dim=6, mlp_dim=10, dtype=torch.float64)
    for p in m.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    ours, wanted = m(x), torch.stack([lrsa(m, image) for image in x])
    torch.testing.assert_close(ours, wanted)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(wanted, wrt, up))


def test_a_row_in_three_patches_weighs_three_quarters():
    from heedful.mixers.grid.catanet import patch_rows

    rows, share = patch_rows(11, 6, torch.device("cpu"))
    assert rows[:, 0].tolist() == [0, 4, 5]
    assert share.tolist() == [1, 1, 1, 1, 0.5, 0.25, 0.5, 0.5, 0.5, 0.5, 1]


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 3, must divide qk_dim, which is 8"):
        TokenAggregationBlock(12, heads=3, qk_dim=8)
    with pytest.raises(ValueError, match="centres is 0, must be a whole number"):
        TokenAggregationBlock(8, centres=0)
    with pytest.raises(ValueError, match="decay is 2, must be between 0 and 1"):
        TokenAggregationBlock(8, decay=2)
    with pytest.raises(ValueError, match="patch is 2, must be at least 3"):
        LocalRegionSelfAttention(8, patch=2)
