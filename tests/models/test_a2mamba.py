"""A2Mamba's frame: order of a block, what its scales act on, stem and head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.mixers.scan.a2mamba import A2MambaGlobalAttention, MultiScaleAttentionAugmentedSSM
from heedful.models.a2mamba import A2Mamba, Block
from heedful.testing.check_backbone import image, make


def norm(x, layer):
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def depthwise(x, conv):
    return F.conv2d(x, conv.weight, conv.bias, padding=1, groups=x.shape[1])


def conv_norm(x, part, stride):
    x = F.conv2d(x, part.conv.weight, None, stride=stride, padding=1)
    x = (x - part.norm.running_mean[:, None, None]) / (part.norm.running_var + 1e-5).sqrt()[:, None, None]
    return x * part.norm.weight[:, None, None] + part.norm.bias[:, None, None]


def block(m, x, scaled, trunk):
    def scale(x, s):
        return x * s.weight[:, None, None] + s.bias[:, None, None] if scaled else x

    def add(x, y, s):
        return scale(x, s) + y if trunk else x + scale(y, s)

    x = x + depthwise(x, m.positions1)
    x = add(x, m.mixer(norm(x, m.norm1)), m.scale1)
    x = x + depthwise(x, m.positions2)
    h = F.gelu(F.conv2d(norm(x, m.norm2), m.mlp.fc1.weight, m.mlp.fc1.bias))
    return add(x, F.conv2d(h + depthwise(h, m.mlp.dwconv), m.mlp.fc2.weight, m.mlp.fc2.bias), m.scale2)


def test_equals_transcription():
    model = make(A2Mamba)
    x = given = image(model, size=(37, 50))
    for stage, (part, blocks) in enumerate(zip(model.downsample, model.stages, strict=True)):
        if stage == 0:
            for i, stride in ((0, 2), (2, 1), (4, 2), (6, 1)):
                x = conv_norm(x, part[i], stride)
                x = F.gelu(x) if i < 6 else x
        else:
            x = conv_norm(x, part, 2)
        x = block(blocks[0], x, stage < 2, stage == 1)
        torch.testing.assert_close(model.features(given)[stage], x)
    y = F.conv2d(x, model.proj.weight, model.proj.bias)
    n = model.norm
    y = (y - n.running_mean[:, None, None]) / (n.running_var + 1e-5).sqrt()[:, None, None]
    y = y * n.weight[:, None, None] + n.bias[:, None, None]
    y = (y * y.sigmoid()).mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(given), y)


def test_three_stages_of_scans_then_attention():
    model = A2Mamba(**A2Mamba.example)
    kinds = [type(stage[0].mixer) for stage in model.stages]
    assert kinds == [MultiScaleAttentionAugmentedSSM] * 3 + [A2MambaGlobalAttention]
    assert model.stages[3][0].mixer.global_bias.shape == (1, 2, 4, 4)


def test_scales_start_as_given():
    scale = A2Mamba(**{**A2Mamba.example, "scale": (1e-6, 1.0, None, None)}).stages[0][0].scale1
    torch.testing.assert_close(scale.weight, torch.full((8,), 1e-6))
    assert not scale.bias.any()


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="scale_path is 'both'"):
        Block(8, torch.nn.Identity(), hidden=8, scale_path="both")
