"""ChAda-ViT: a transcription image by image, padding, positions, authors' names."""

from __future__ import annotations

import pytest
import torch

from heedful import authors
from heedful.models.chada_vit import ChAdaLayer, ChAdaViT
from heedful.models.channel_tokens import stretch_table


def build(**how):
    torch.manual_seed(0)
    model = ChAdaViT(**{**ChAdaViT.example, "classes": 0, **how}).double()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def channels(count, size=(16, 16)):
    torch.manual_seed(1)
    return torch.randn(count, 1, *size, dtype=torch.float64)


def norm(x, layer, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def transcribed_layer(layer, x):
    """Tokens (n, c) of one image, all of them seen."""
    q, k, v = (norm(x, layer.norm1) @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1)
    outs, width = [], x.shape[1] // layer.heads
    for h in range(layer.heads):
        own = slice(h * width, (h + 1) * width)
        weights = (q[:, own] @ k[:, own].T / width**0.5).exp()
        outs.append(weights @ v[:, own] / weights.sum(-1, keepdim=True))
    x = norm(x + torch.cat(outs, -1) @ layer.out.weight.T + layer.out.bias, layer.norm1)
    wide = (x @ layer.linear1.weight.T + layer.linear1.bias).clamp(min=0)
    return norm(x + wide @ layer.linear2.weight.T + layer.linear2.bias, layer.norm2)


def transcribed(model, x):
    """One image (c, height, width): its normed tokens."""
    patch = model.patches.patch
    size = (x.shape[1] // patch, x.shape[2] // patch)
    places = model.positions[1:]
    if size != (model.side, model.side):
        places = stretch_table(places, model.side, size)
    tokens = [model.class_token[0, 0] + model.positions[0]]
    for c in range(len(x)):
        for i in range(size[0]):
            for j in range(size[1]):
                cut = x[c, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
                token = (model.patches.proj.weight[:, 0] * cut).sum((1, 2)) + model.patches.proj.bias
                tokens.append(token + model.channels[c] + places[i * size[1] + j])
    x = torch.stack(tokens)
    for layer in model.layers:
        x = transcribed_layer(layer, x)
    return norm(x, model.norm, 1e-6)


@pytest.mark.parametrize("size", [(16, 16), (13, 22)])
def test_equals_transcription(size):
    model, counts = build(), (3, 1, 2)
    x = channels(6, size)
    wanted = [transcribed(model, image) for image in x[:, 0].split(counts)]
    y = model(x, counts)
    torch.testing.assert_close(y, torch.stack([tokens[0] for tokens in wanted]))
    torch.testing.assert_close(model.patch_tokens(x, counts), torch.cat([tokens[1:] for tokens in wanted]))
    leaves = list(model.parameters())
    ours, theirs = (
        torch.autograd.grad((z**3).sum(), leaves) for z in (y, torch.stack([t[0] for t in wanted]))
    )
    torch.testing.assert_close(ours, theirs)


def test_other_images_and_padding_are_not_seen():
    model = build()
    x, counts = channels(7), torch.tensor([2, 4, 1])
    y = model(x, counts)
    for row, image in enumerate(x.split(counts.tolist())):
        torch.testing.assert_close(y[row : row + 1], model(image, [len(image)]))
    black = model(torch.zeros(3, 1, 16, 16, dtype=torch.float64), (3,))
    model.patches.proj.bias.data.zero_()  # tokens of zeros are no padding
    assert (model(torch.zeros(3, 1, 16, 16, dtype=torch.float64), (3,)) - black).abs().max() > 1e-6
    torch.testing.assert_close(
        model(0 * x[:3], (3,))[0], transcribed(model, torch.zeros(3, 16, 16, dtype=torch.float64))[0]
    )


def test_attention_maps():
    model = build()
    x, counts = channels(5), (4, 1)
    maps = model.attention_maps(x, counts)
    assert maps.shape == (2, 3, 65, 65)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert not maps[1, :, :, 17:].any()
    tokens, mask = model.embed(x, counts)
    tokens = model.layers[0](tokens, mask)
    last = model.layers[1]
    value = (last.norm1(tokens) @ last.qkv.weight[24:].T + last.qkv.bias[24:]).unflatten(-1, (3, 4))
    y = last.out((maps @ value.transpose(1, 2)).transpose(1, 2).flatten(2))
    x = last.norm1(tokens + y)
    wanted = last.norm2(x + last.linear2(last.linear1(x).relu()))
    torch.testing.assert_close(last(tokens, mask), wanted)
    nothing = last.attention_maps(tokens[1:], torch.zeros(1, 65, dtype=torch.bool))
    assert not nothing.any()


def test_dropout_grows_and_is_off_in_eval():
    model = build(layer_dropout=0.4, depth=3)
    assert [layer.rate for layer in model.layers] == pytest.approx([0.0, 0.2, 0.4])
    x = channels(3)
    assert torch.equal(model(x, (2, 1)), model(x, (2, 1)))
    model.train()
    assert not torch.equal(model(x, (2, 1)), model(x, (2, 1)))


def test_every_parameter_gets_a_gradient():
    model = build(classes=5).train()
    model(channels(7), (4, 2, 1)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_authors_names():
    model = build()
    theirs = {}
    for name, value in model.state_dict().items():
        for ours, told in (
            ("class_token", "cls_token"),
            ("channels", "channel_token"),
            ("positions", "pos_embed"),
            ("patches.", "token_learner."),
            ("layers.", "blocks."),
            ("qkv.", "self_attn.in_proj_"),
            (".out.", ".self_attn.out_proj."),
        ):
            name = name.replace(ours, told)
        axes = {"channel_token": (0, 2), "pos_embed": (0, 1)}.get(name, ())
        for axis in axes:
            value = value.unsqueeze(axis)
        theirs[name] = value
    other = authors.load(ChAdaViT(**{**ChAdaViT.example, "classes": 0}).double(), theirs).eval()
    x = channels(3)
    assert torch.equal(other(x, (2, 1)), model(x, (2, 1)))


@pytest.mark.compiled
def test_compiles_as_a_whole():
    model, x = build(), channels(7)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, (4, 2, 1)), model(x, (4, 2, 1)))


@pytest.mark.door
def test_errors():
    model = build()
    for call, message in (
        (lambda: model(channels(5), (3, 1)), r"counts is \[3, 1\], must be numbers from 1 to 4 with sum 5"),
        (lambda: model(channels(5), (5,)), "must be numbers from 1 to 4"),
        (lambda: model(channels(5), (4, 0, 1)), "must be numbers from 1 to 4"),
        (lambda: model(channels(0), ()), "must be numbers from 1 to 4"),
        (lambda: model(channels(2)[:, 0], (2,)), r"must be \(channels, 1, height, width\)"),
        (lambda: model(channels(2, (3, 9)), (2,)), "height and width must be at least 4"),
        (lambda: ChAdaLayer(12, heads=5, hidden=8), "heads is 5, must divide dim"),
        (lambda: ChAdaViT(max_channels=0), "max_channels is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
