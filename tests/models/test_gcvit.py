"""GC ViT's own facts; its mixers are tested in tests/mixers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful import authors
from heedful.mixers.grid.gcvit import GCViTWindowAttention, GlobalQueryWindowAttention
from heedful.models.gcvit import GCViT, Reduce


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Over the channels of a map."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.einsum("oc,bchw->bohw", layer.weight, x) + layer.bias[:, None, None]


def reduce(x: Tensor, part: Reduce) -> Tensor:
    x = layer_norm(x, part.norm1)
    return layer_norm(F.conv2d(x + part.conv(x), part.reduction.weight, stride=2, padding=1), part.norm2)


def transcription(model: GCViT, x: Tensor) -> Tensor:
    """The published steps around the mixers and the generator."""
    x = F.conv2d(x, model.stem.weight, model.stem.bias, stride=2, padding=1)
    for down, stage in zip(model.downsample, model.stages, strict=True):
        x = reduce(x, down)
        query = stage.generator(x)
        for number, block in enumerate(stage.blocks):
            z = layer_norm(x, block.norm1)
            z = block.mixer(z, query=query) if number in (1, 3, 5) else block.mixer(z)
            x = x + block.scale1.gamma[:, None, None] * z
            z = linear(layer_norm(x, block.norm2), block.mlp.fc1)
            z = linear(z * (1 + torch.erf(z / 2**0.5)) / 2, block.mlp.fc2)
            x = x + block.scale2.gamma[:, None, None] * z
    return layer_norm(x, model.norm).mean((2, 3)) @ model.head.weight.T + model.head.bias


def test_equals_transcription_with_gradients() -> None:
    torch.manual_seed(0)
    model = GCViT(**{**GCViT.example, "depths": (2, 3, 2, 2)}, layer_scale=0.6).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 64, 70, dtype=torch.float64, requires_grad=True)
    ours, literal = model(x), transcription(model, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *model.parameters()), torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up), rtol=1e-6, atol=1e-9
    )


def test_kinds_alternate_and_generators_halve_to_the_window() -> None:
    model = GCViT(features_only=True)
    assert [len(stage.generator.convs) for stage in model.stages] == [3, 2, 1, 1]
    kinds = [type(block.mixer) for block in model.stages[0].blocks]
    assert kinds == [GCViTWindowAttention, GlobalQueryWindowAttention, GCViTWindowAttention]
    assert [stage.generator.window for stage in model.stages] == [7, 7, 14, 7]


def test_names_of_the_authors() -> None:
    theirs = {
        "patch_embed.proj.bias": "stem.bias",
        "patch_embed.conv_down.conv.2.fc.2.weight": "downsample.0.conv.excite.weight",
        "levels.1.downsample.norm1.bias": "downsample.2.norm1.bias",
        "levels.2.q_global_gen.to_q_global.0.conv.3.weight": "stages.2.generator.convs.0.pointwise.weight",
        "levels.2.blocks.18.attn.relative_position_bias_table": "stages.2.blocks.18.mixer.relative_bias",
        "levels.3.blocks.4.gamma2": "stages.3.blocks.4.scale2.gamma",
    }
    taken = authors.table_of(GCViT).apply({name: torch.zeros(1, 1) for name in theirs})
    assert [*taken] == [*theirs.values()]
    state = GCViT(layer_scale=1e-5).state_dict()
    assert set(taken) <= set(state)


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="windows is"):
        GCViT(windows=(7, 7))
