"""The frame that RAVLT and MAViT share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.mala import MagnitudeAwareLinearAttention
from heedful.mixers.grid.rala import RALAVanillaAttention, RankAugmentedLinearAttention
from heedful.models.mala import MAViT
from heedful.models.rala import RAVLT, Block
from heedful.testing.check_backbone import image, make


def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def batch_norm(x: Tensor, layer: torch.nn.BatchNorm2d) -> Tensor:
    scale = layer.weight / (layer.running_var + 1e-5).sqrt()
    return x * scale[:, None, None] + (layer.bias - layer.running_mean * scale)[:, None, None]


def block(m: Block, x: Tensor) -> Tensor:
    def dw(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
        return F.conv2d(x, conv.weight, conv.bias, padding=1, groups=x.shape[1])

    x = x + dw(x, m.positions)
    x = x + m.scale1.gamma[:, None, None] * m.mixer(norm(x, m.norm1))
    h = F.gelu(F.conv2d(norm(x, m.norm2), m.mlp.fc1.weight, m.mlp.fc1.bias))
    h = F.conv2d(h + dw(h, m.mlp.dwconv), m.mlp.fc2.weight, m.mlp.fc2.bias)
    return x + m.scale2.gamma[:, None, None] * h


@pytest.mark.parametrize("kind", [RAVLT, MAViT])
def test_equals_transcription(kind):
    model = make(kind)
    x = image(model, size=(37, 50))
    maps = []
    for stage in range(4):
        layers = list(model.downsample[stage])
        assert [layer.stride[0] for layer in layers if isinstance(layer, torch.nn.Conv2d)] == (
            [2] if stage else [2, 1, 1, 2]
        )
        for i in range(0, len(layers), 3):  # convolution, batch norm, and GELU but after the last
            conv = layers[i]
            y = F.conv2d(x if i == 0 else y, conv.weight, conv.bias, stride=conv.stride, padding=1)
            y = batch_norm(y, layers[i + 1])
            if i + 2 < len(layers):
                y = F.gelu(y)
        x = block(model.stages[stage][0], y)
        maps.append(x)
    for ours, theirs in zip(model.features(image(model, size=(37, 50))), maps, strict=True):
        torch.testing.assert_close(ours, theirs)
    y = batch_norm(F.conv2d(x, model.proj.weight, model.proj.bias), model.norm)
    y = (y * y.sigmoid()).mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(image(model, size=(37, 50))), y)


@pytest.mark.parametrize(
    ("kind", "linear"), [(RAVLT, RankAugmentedLinearAttention), (MAViT, MagnitudeAwareLinearAttention)]
)
def test_two_linear_stages_then_softmax(kind, linear):
    model = kind(**kind.example)
    kinds = [type(stage[0].mixer) for stage in model.stages]
    assert kinds == [linear, linear, RALAVanillaAttention, RALAVanillaAttention]


def test_layer_scales_start_as_given():
    model = RAVLT(**RAVLT.example, layer_scale=(1.0, 0.5, 1e-6, 0.0))
    for stage, start in zip(model.stages, (1.0, 0.5, 1e-6, 0.0), strict=True):
        for scale in (stage[0].scale1, stage[0].scale2):
            torch.testing.assert_close(scale.gamma, torch.full_like(scale.gamma, start))
