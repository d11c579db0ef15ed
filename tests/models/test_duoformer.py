"""DuoFormer: what lies under a cell, attention inside cells, attention among them."""

from __future__ import annotations

import pytest
import torch

from heedful import authors
from heedful.models.duoformer import DuoFormer, MultiscaleFormer, cells


def build(**options):
    torch.manual_seed(0)
    model = MultiscaleFormer(6, **{"scales": 2, "classes": 4, "depth": 2, "heads": 2, "side": 2, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def test_places_under_a_cell():
    """At 224 pixels: flat indices of the 4, 16 and 64 places on the finer maps."""
    maps = [torch.arange(s * s, dtype=torch.float64).view(1, 1, s, s) for s in (56, 28, 14, 7)]
    tokens = cells(maps)[0, :, :, 0].long()
    assert tokens.shape == (49, 85)
    for r in range(7):
        for c in range(7):
            own = tokens[7 * r + c].tolist()
            second = [2 * r * 14 + 2 * c, (2 * r + 1) * 14 + 2 * c]
            assert own[:5] == [7 * r + c, *second, *(place + 1 for place in second)]
            assert own[5:21] == [(4 * r + i) * 28 + 4 * c + j for i in range(4) for j in range(4)]
            assert own[21:] == [(8 * r + i) * 56 + 8 * c + j for i in range(8) for j in range(8)]


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def attend(x, mixer):
    """(n, c), two heads of 3 channels."""
    q, k, v = (x @ mixer.qkv.weight.T + mixer.qkv.bias).split(6, -1)
    heads = []
    for own in (slice(0, 3), slice(3, 6)):
        weight = (q[:, own] @ k[:, own].T / 3**0.5).exp()
        heads.append(weight @ v[:, own] / weight.sum(-1, keepdim=True))
    return torch.cat(heads, -1) @ mixer.proj.weight.T + mixer.proj.bias


@pytest.mark.parametrize("residual", [False, True])
def test_equals_transcription_with_gradients(residual):
    model = build(patch_residual=residual)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    rows = []
    for image in x:
        firsts = [model.class_token[0, 0]]
        for cell in image:
            tokens = cell + model.scale_positions[0, 0]
            for block in model.scale_blocks:
                tokens = tokens + attend(norm(tokens, block.norm1), block.mixer)
                hidden = norm(tokens, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
                hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
                tokens = tokens + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
            firsts.append(tokens[0])
        y = torch.stack(firsts) + model.positions[0]
        for block in model.patch_blocks:
            y = (y if residual else 0) + attend(y, block)
        rows.append(model.head.weight @ y[0] + model.head.bias)
    y, wanted = model(x), torch.stack(rows)
    torch.testing.assert_close(y, wanted)
    leaves, up = (x, *model.parameters()), torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(z, leaves, up) for z in (y, wanted)))


@pytest.mark.parametrize(("scales", "tokens"), [(2, 6), (3, 22), (4, 86)])
def test_published_numbers_of_tokens(scales, tokens):
    with torch.device("meta"):
        model = MultiscaleFormer(768, scales=scales, classes=5, heads=12)
    assert model.scale_positions.shape == (1, 1, tokens, 768)
    block = 12 * 768**2 + 13 * 768  # two norms, attention, an MLP four times as wide
    patch = 4 * 768**2 + 4 * 768
    tables = tokens * 768 + 768 + 50 * 768
    assert sum(p.numel() for p in model.parameters()) == 12 * (block + patch) + tables + 769 * 5


def test_whole_model_on_a_pyramid_of_any_size():
    torch.manual_seed(0)
    model = DuoFormer(**DuoFormer.example).double()
    maps = [x.double() for x in model.example_inputs()["maps"]]
    projected = [
        torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]
        for conv, x in zip(model.projections, maps, strict=True)
    ]
    tokens = torch.cat([model.scale_token.expand(2, 4, 1, 12), cells(projected)], dim=2)
    y = model(maps)
    torch.testing.assert_close(y, model.former(tokens))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    sizes = ((12, 20), (6, 10), (3, 5))
    larger = [torch.randn(1, x.shape[1], *s, dtype=torch.float64) for x, s in zip(maps, sizes, strict=True)]
    assert model(larger).shape == (1, 5)


def test_authors_names():
    model = build()
    names = {"scale_positions": "pos_embed_for_scale", "positions": "pos_embed", "class_token": "cls_token"}
    theirs = {"fc_norm.weight": torch.ones(6)}
    for name, value in model.state_dict().items():
        name = name.replace("scale_blocks", "scaleBlocks").replace(".mixer.", ".attn.")
        if name.startswith("patch_blocks"):
            _, number, rest = name.split(".", 2)
            name = f"blocks.{number}.attn.{rest}"
        theirs[names.get(name, name)] = value
    other = MultiscaleFormer(6, scales=2, classes=4, depth=2, heads=2, side=2).double()
    authors.load(other, theirs)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(other(x), model(x))


@pytest.mark.door
def test_errors():
    model = DuoFormer(**DuoFormer.example)
    maps = model.example_inputs()["maps"]
    with pytest.raises(ValueError, match="maps has 2 maps, must have 3"):
        model(maps[:2])
    with pytest.raises(ValueError, match="must have sides that double"):
        model([maps[0][..., :7], *maps[1:]])
    with pytest.raises(ValueError, match="maps has shape"):
        model([maps[0][:, :3], *maps[1:]])
