"""ChannelViT: a transcription token by token, positions, identities, sampling of channels, authors' names."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heedful import authors
from heedful.models.channel_tokens import sample_channels, stretch_table
from heedful.models.channelvit import ChannelViT


def build(**how):
    torch.manual_seed(0)
    model = ChannelViT(**{**ChannelViT.example, **how}).double()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def image(channels=3, size=(16, 16), batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def norm(x, layer, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def cubic(table, side, size):
    """Bicubic interpolation, one number at a time, with steps of side / (n + 0.1); a = -0.75."""

    def weight(t):
        t = abs(t)
        if t <= 1:
            return 1.25 * t**3 - 2.25 * t**2 + 1
        return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def along(n):
        rows = torch.zeros(n, side, dtype=torch.float64)
        for i in range(n):
            place = (i + 0.5) * side / (n + 0.1) - 0.5
            for source in range(math.floor(place) - 1, math.floor(place) + 3):
                rows[i, min(max(source, 0), side - 1)] += weight(place - source)
        return rows

    grid = table.reshape(side, side, -1)
    rows, columns = along(size[0]), along(size[1])
    return torch.stack(
        [
            sum(
                rows[i, a] * columns[j, b] * grid[a, b]
                for a in range(side)
                for b in range(side)
                if rows[i, a] and columns[j, b]
            )
            for i in range(size[0])
            for j in range(size[1])
        ]
    )


def transcribed(model, x, ids):
    """One image (c, height, width) whose channels are `ids`; the class token after the norm."""
    side, patch, heads = model.side, model.patches.patch, 3
    size = (x.shape[1] // patch, x.shape[2] // patch)
    table = model.positions[0]
    native = len(ids) == 1 and size == (side, side)
    places = table[1:] if native else cubic(table[1:], side, size)
    tokens = [model.class_token[0, 0] + table[0]]
    for c, own in enumerate(ids):
        for i in range(size[0]):
            for j in range(size[1]):
                cut = x[c, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
                token = (model.patches.proj.weight[:, 0] * cut).sum((1, 2)) + model.patches.proj.bias
                tokens.append(token + model.channel_embed.weight[own] + places[i * size[1] + j])
    x = torch.stack(tokens)
    for block in model.blocks:
        q, k, v = (norm(x, block.norm1) @ block.mixer.qkv.weight.T + block.mixer.qkv.bias).chunk(3, -1)
        outs, width = [], x.shape[1] // heads
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            weights = (q[:, own] @ k[:, own].T / width**0.5).exp()
            outs.append(weights @ v[:, own] / weights.sum(-1, keepdim=True))
        x = x + torch.cat(outs, -1) @ block.mixer.proj.weight.T + block.mixer.proj.bias
        wide = norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        x = x + (wide * (1 + torch.erf(wide / 2**0.5)) / 2) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return norm(x, model.norm)[0]


@pytest.mark.parametrize("case", [((0, 3, 4), (16, 16)), ((2,), (16, 16)), ((4, 1), (26, 20))])
def test_equals_transcription(case):
    ids, size = case
    model = build(classes=0)
    x = image(len(ids), size, batch=1)
    y = model(x, torch.tensor(ids))
    wanted = transcribed(model, x[0], ids)
    torch.testing.assert_close(y[0], wanted)
    leaves = [p for n, p in model.named_parameters()]
    ours, theirs = (torch.autograd.grad((z**3).sum(), leaves) for z in (y[0], wanted))
    torch.testing.assert_close(ours, theirs)


def test_every_sample_has_its_own_channels():
    model = build()
    x, ids = image(), torch.tensor([[0, 1, 4], [3, 2, 0]])
    y = model(x, ids)
    for row in range(2):
        torch.testing.assert_close(y[row : row + 1], model(x[row : row + 1], ids[row]))
    torch.testing.assert_close(model(x), model(x, torch.arange(3)))


def test_the_order_of_channels_is_free():
    model = build()
    x, ids, order = image(4), torch.tensor([0, 2, 3, 4]), [2, 0, 3, 1]
    torch.testing.assert_close(model(x[:, order], ids[order]), model(x, ids))
    assert (model(x[:, order], ids) - model(x, ids)).abs().max() > 1e-3


def test_positions():
    model = build()
    own = model.position_table(1, (4, 4))
    assert torch.equal(own, model.positions)
    stretched = model.position_table(2, (4, 4))[0]
    torch.testing.assert_close(stretched[1:17], cubic(model.positions[0, 1:], 4, (4, 4)))
    torch.testing.assert_close(stretched[17:], stretched[1:17])
    assert (stretched[1:17] - own[0, 1:]).abs().max() > 1e-3
    model.published_positions = False
    exact = model.position_table(2, (4, 4))[0]
    assert torch.equal(exact[1:17], own[0, 1:])
    assert model.position_table(2, (5, 3)).shape == (1, 31, 12)
    for size in ((1, 1), (3, 7), (14, 14), (37, 50)):
        table = torch.randn(9, 2, dtype=torch.float64)
        factors = ((size[0] + 0.1) / 3, (size[1] + 0.1) / 3)
        wanted = F.interpolate(table.T.reshape(1, 2, 3, 3), scale_factor=factors, mode="bicubic")
        torch.testing.assert_close(stretch_table(table, 3, size), wanted[0].flatten(1).T)


def test_one_channel_without_embedding_is_a_plain_vision_transformer():
    timm = pytest.importorskip("timm")
    model = build(in_channels=1, classes=0)
    nn.init.zeros_(model.channel_embed.weight)
    plain = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=0, embed_dim=12, depth=2, num_heads=3
    )
    names = (("class_token", "cls_token"), ("positions", "pos_embed"), ("patches.", "patch_embed."))
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in (*names, (".mixer.", ".attn.")):
            name = name.replace(ours, theirs)
        state[name] = value
    del state["channel_embed.weight"]
    plain.load_state_dict(state, strict=True)
    x = image(1)
    torch.testing.assert_close(model(x), plain.double().eval()(x))


def test_channels_are_sampled_in_training():
    torch.manual_seed(0)
    x = torch.arange(4.0)[None, :, None, None].expand(3, 4, 2, 2)
    ids = torch.tensor([[5, 6, 7, 8]] * 3)
    counts, kept = torch.zeros(5), torch.zeros(4)
    for _ in range(800):
        some, own = sample_channels(x, ids)
        assert torch.equal(some[:, :, 0, 0] + 5, own.to(some.dtype))
        assert len(own[0].unique()) == own.shape[1]
        counts[own.shape[1]] += 1
        kept[own[0] - 5] += 1
    # 800 draws with probability p: six deviations of sqrt(p (1 - p) / 800) are below 0.11.
    torch.testing.assert_close(counts / 800, torch.tensor([0, 0.25, 0.25, 0.25, 0.25]), rtol=0, atol=0.11)
    torch.testing.assert_close(kept / 800, torch.full((4,), 0.625), rtol=0, atol=0.11)

    model, x = build().train(), image(5)
    lengths = {model.embed(x, None)[0].shape[1] for _ in range(40)}
    assert lengths == {1 + 16 * m for m in (1, 2, 3, 4, 5)}
    model.sample_channels = False
    torch.testing.assert_close(model(x), model.eval()(x))


def test_intermediate_layers():
    model, x = build(), image()
    first, last = model.intermediate_layers(x, layers=2)
    torch.testing.assert_close(model(x), model.head(last[:, 0]))
    tokens, size = model.embed(x, None)
    torch.testing.assert_close(first, model.norm(model.blocks[0](tokens, size)))


def test_every_parameter_gets_a_gradient():
    model = build(sample_channels=False).train()
    model(image(5)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_authors_names():
    model = build(classes=0)
    names = (
        ("class_token", "cls_token"),
        ("positions", "pos_embed"),
        (r"patches\.", "patch_embed."),
        (r"channel_embed\.", "patch_embed.channel_embed."),
        (r"blocks\.(\d)\.mixer\.", r"blocks.\1.attn."),
    )
    sampling = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names:
            name = re.sub("^" + ours, theirs, name)
        sampling[name] = value[:, :, None] if name == "patch_embed.proj.weight" else value
    plain = dict(sampling)
    embed = plain.pop("patch_embed.channel_embed.weight")
    plain["patch_embed.channel_embed"] = embed.T[None, :, :, None, None]
    x = image()
    for theirs in (sampling, plain):
        other = authors.load(ChannelViT(**{**ChannelViT.example, "classes": 0}).double(), theirs).eval()
        assert torch.equal(other(x), model(x))


@pytest.mark.door
def test_errors():
    model = build()
    for call, message in (
        (lambda: model(image(6)), "x has 6 channels, must have 1 to 5"),
        (lambda: model(image(3), torch.tensor([0, 1])), r"channels has shape \(2,\), must be \(3,\)"),
        (lambda: model(image(2), torch.tensor([0, 5])), "channels go from 0 to 5, must be 0 to 4"),
        (lambda: model(image(2, (3, 16))), "height and width must be at least 4"),
        (lambda: model(image()[0]), "x has shape"),
        (lambda: ChannelViT(patch=15), "patch is 15, must divide image_size"),
        (lambda: ChannelViT(heads=7), "heads is 7, must divide dim"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
