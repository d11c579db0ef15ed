"""FocalNet's own facts; what holds for every backbone is tested in test_backbones.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful import authors
from heedful.models.focalnet import Embed, FocalNet


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Over the channels of a map."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.einsum("oc,bchw->bohw", layer.weight.flatten(1), x) + layer.bias[:, None, None]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def modulation(x: Tensor, m: nn.Module) -> Tensor:
    dim = x.shape[1]
    parts = linear(x, m.f)
    context, gates, total = parts[:, dim : 2 * dim], parts[:, 2 * dim :], 0
    for level, layer in enumerate(m.focal_layers):
        side = layer[0].weight.shape[-1]
        assert side == 3 + 2 * level
        context = gelu(F.conv2d(context, layer[0].weight, padding=side // 2, groups=dim))
        total = total + context * gates[:, level : level + 1]
    total = total + gelu(context.mean((2, 3), keepdim=True)) * gates[:, -1:]
    return linear(parts[:, :dim] * linear(total, m.h), m.proj)


def transcription(model: FocalNet, x: Tensor, *, conv_embed: bool, postln: bool) -> Tensor:
    for stage, (down, blocks) in enumerate(zip(model.downsample, model.stages, strict=True)):
        padding = (1 if stage else 2) if conv_embed else 0
        stride = 2 if stage else 4
        x = layer_norm(F.conv2d(x, down.proj.weight, down.proj.bias, stride, padding), down.norm)
        for block in blocks:
            scales = [
                getattr(s, "gamma", torch.ones(())).view(-1, 1, 1) for s in (block.scale1, block.scale2)
            ]

            def mlp(z: Tensor, block: nn.Module = block) -> Tensor:
                return linear(gelu(linear(z, block.mlp.fc1)), block.mlp.fc2)

            if postln:
                x = x + scales[0] * layer_norm(modulation(x, block.mixer), block.norm1)
                x = x + scales[1] * layer_norm(mlp(x), block.norm2)
            else:
                x = x + scales[0] * modulation(layer_norm(x, block.norm1), block.mixer)
                x = x + scales[1] * mlp(layer_norm(x, block.norm2))
    return layer_norm(x, model.norm).mean((2, 3)) @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("paper", ["tiny", "large"])
def test_equals_transcription_with_gradients(paper: str) -> None:
    torch.manual_seed(0)
    large = paper == "large"
    how = {"conv_embed": large, "postln": large, "layer_scale": 0.3 if large else None}
    model = FocalNet(classes=3, depths=(1, 2), dims=(6, 8), levels=(2, 3), mlp_ratio=2, **how).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 24, 32, dtype=torch.float64, requires_grad=True)
    ours, literal = model(x), transcription(model, x, conv_embed=large, postln=large)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *model.parameters()), torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def test_patches_without_overlap_are_filled_with_zeros() -> None:
    embed = Embed(3, 5, 4, 4, 0)
    x = torch.randn(1, 3, 9, 8)
    full = torch.zeros(1, 3, 12, 8)
    full[:, :, :9] = x
    torch.testing.assert_close(embed(x), embed(full))


def test_isotropic_models_give_one_map() -> None:
    model = FocalNet(depths=(2,), dims=(8,), patch_size=16, features_only=True)
    assert model.reductions == (16,)
    assert [tuple(y.shape) for y in model(torch.randn(1, 3, 64, 40))] == [(1, 8, 4, 3)]


def test_the_authors_names_of_one_stage_and_of_many() -> None:
    table = authors.table_of(FocalNet)
    assert table.name("layers.2.blocks.11.gamma_2") == "stages.2.11.scale2.gamma"
    assert table.name("layers.0.blocks.1.modulation.ln.weight") == "stages.0.1.mixer.ln.weight"
    down = table.apply({f"layers.{stage}.downsample.norm.bias": torch.zeros(1) for stage in range(3)})
    assert [*down] == [f"downsample.{stage}.norm.bias" for stage in (1, 2, 3)]


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="levels is"):
        FocalNet(levels=(2, 3))
    with pytest.raises(ValueError, match="patch_size is 16, must be 4"):
        FocalNet(patch_size=16, conv_embed=True)
