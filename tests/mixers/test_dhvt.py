"""Head-interacted attention, and the vision transformer made of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.mixers.heads.dhvt import HeadInteractedAttention
from heedful.models.dhvt import DAFF, DHVT, OverlappingPatches
from heedful.testing.check_backbone import image, make


def build(dim=6, heads=2):
    torch.manual_seed(0)
    mixer = HeadInteractedAttention(dim, heads=heads, dtype=torch.float64)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def literal(m, x, mask=None):
    """One row, one head at a time."""
    d = m.head_dim
    rows = []
    for b, row in enumerate(x):
        seen = list(range(len(row))) if mask is None else mask[b].nonzero()[:, 0].tolist()
        mean = sum(row[i] for i in seen) / len(seen)
        tokens = list(row)
        for h in range(m.heads):
            wide = m.head_proj.weight @ mean[h * d : (h + 1) * d] + m.head_proj.bias
            parts = []
            for part in wide.split(d):
                part = (part - part.mean()) / ((part - part.mean()).square().mean() + 1e-5).sqrt()
                part = part * m.head_norm.weight + m.head_norm.bias
                parts.append(part * (1 + torch.erf(part / 2**0.5)) / 2)
            tokens.append(torch.cat(parts) + m.head_positions[0, h])
        seen = seen + list(range(len(row), len(tokens)))
        tokens = torch.stack(tokens)
        q, k, v = (tokens @ m.qkv.weight.T + m.qkv.bias).split(m.dim, -1)
        heads = []
        for h in range(m.heads):
            own = slice(h * d, (h + 1) * d)
            weight = (q[:, own] @ k[seen, own].T / d**0.5).exp()
            heads.append(weight @ v[seen, own] / weight.sum(-1, keepdim=True))
        y = torch.cat(heads, -1) @ m.proj.weight.T + m.proj.bias
        first = y[0] + sum(y[len(row) :]) / m.heads
        rows.append(torch.cat([first[None], y[1 : len(row)]]))
    return torch.stack(rows)


@pytest.mark.parametrize("hidden", [False, True])
def test_equals_transcription_with_gradients(hidden):
    mixer = build()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, 2] = False
    mask = mask if hidden else None
    y, wanted, up = mixer(x, mask=mask), literal(mixer, x, mask), torch.randn_like(x)
    torch.testing.assert_close(y, wanted)
    leaves = (x, *mixer.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(z, leaves, up) for z in (y, wanted)))


def test_as_many_head_tokens_as_heads_which_patches_attend_to():
    mixer = build(12, 4)
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    assert mixer.head_tokens(x).shape == (1, 4, 12)
    y = mixer(x)
    with torch.no_grad():
        mixer.head_positions += 1
    assert y.shape == x.shape
    assert not torch.isclose(mixer(x), y).any()


def test_parameter_count():
    mixer = HeadInteractedAttention(16, heads=4)
    own = (4 * 16 + 16) + 2 * 4 + 4 * 16
    assert sum(p.numel() for p in mixer.parameters()) == 4 * 16 * 16 + 4 * 16 + own


def batch_norm(x, norm):
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def test_daff_equals_transcription():
    model = make(DHVT)
    daff = model.blocks[0].mlp
    assert isinstance(daff, DAFF)
    x = torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)
    patches = x[:, 1:].mT.unflatten(2, (3, 4))
    h = torch.einsum("oc,bchw->bohw", daff.conv1.weight[:, :, 0, 0], patches) + daff.conv1.bias[:, None, None]
    h = gelu(batch_norm(h, daff.bn1))
    local = F.conv2d(h, daff.conv2.weight, daff.conv2.bias, padding=1, groups=64)
    h = h + gelu(batch_norm(local, daff.bn2))
    h = torch.einsum("oc,bchw->bohw", daff.conv3.weight[:, :, 0, 0], h) + daff.conv3.bias[:, None, None]
    h = batch_norm(h, daff.bn3)
    squeezed = gelu(h.mean((2, 3)) @ daff.compress.weight.T + daff.compress.bias)
    scale = squeezed @ daff.excitation.weight.T + daff.excitation.bias
    wanted = torch.cat([(x[:, 0] * scale)[:, None], h.flatten(2).mT], dim=1)
    y = daff(x, (3, 4))
    torch.testing.assert_close(y, wanted)
    leaves, up = (x, *daff.parameters()), torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(z, leaves, up) for z in (y, wanted)))


@pytest.mark.parametrize(("patch", "widths"), [(2, [16]), (4, [8, 16]), (16, [2, 4, 8, 16])])
def test_patches_equal_transcription(patch, widths):
    torch.manual_seed(0)
    embed = OverlappingPatches(3, 16, patch).double().eval()
    for parameter in embed.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 3, 20, 35, dtype=torch.float64)
    y = x * embed.before.alpha + embed.before.beta
    for step, (conv, width) in enumerate(zip(embed.convs, widths, strict=True)):
        assert conv.conv.out_channels == width
        y = batch_norm(F.conv2d(y, conv.conv.weight, stride=2, padding=1), conv.norm)
        if step < len(widths) - 1 or patch == 2:
            y = gelu(y)
    torch.testing.assert_close(embed(x), y * embed.after.alpha + embed.after.beta)


def test_model_and_its_map():
    model = make(DHVT)
    x = image(model)
    tokens = model.embed(x).flatten(2).mT
    tokens = torch.cat([model.class_token.expand(2, 1, 16), tokens], dim=1)
    for block in model.blocks:
        tokens = tokens + block.mixer(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens), (8, 8))
    torch.testing.assert_close(model(x), model.head(model.norm(tokens[:, 0])))
    torch.testing.assert_close(model.features(x), [tokens[:, 1:].mT.unflatten(2, (8, 8))])
    model = make(DHVT, features_only=True)
    (last,) = model(F.pad(x, (0, 16)))
    assert last.shape == (2, 16, 8, 10)
    last.square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == [f"blocks.1.mlp.{n}.{p}" for n in ("compress", "excitation") for p in ("weight", "bias")]


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        HeadInteractedAttention(12, heads=5)
    with pytest.raises(ValueError, match="context is given"):
        HeadInteractedAttention(12, heads=4)(torch.zeros(1, 2, 12), context=torch.zeros(1, 2, 12))
    with pytest.raises(ValueError, match="patch is 6, must be a power of 2"):
        DHVT(patch=6)
