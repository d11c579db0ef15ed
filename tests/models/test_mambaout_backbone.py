"""MambaOut's frame, and timm's names for its weights."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from heedful import authors
from heedful.models.mambaout import MambaOut
from heedful.testing.check_backbone import image, make


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def test_equals_transcription():
    model = make(MambaOut, depths=(2, 1, 1, 1))
    x = image(model)

    def halve(x, part):
        y = F.conv2d(x, part.conv.weight, part.conv.bias, stride=2, padding=1)
        return norm(y.permute(0, 2, 3, 1), part.norm).permute(0, 3, 1, 2)

    for stage, blocks in enumerate(model.stages):
        parts = model.downsample[stage]
        if stage == 0:
            x = halve(F.gelu(halve(x, parts[0])), parts[2])
        else:
            x = halve(x, parts)
        for block in blocks:
            x = x + block.mixer(x)
        torch.testing.assert_close(model.features(image(model))[stage], x)
    mean = norm(x.flatten(2).mean(2), model.norm1)
    y = norm(F.gelu(mean @ model.hidden.weight.T + model.hidden.bias), model.norm2)
    torch.testing.assert_close(model(image(model)), y @ model.head.weight.T + model.head.bias)


def test_timm_names():
    model = make(MambaOut)
    names = (
        (r"downsample\.0\.0\.(\w+)\.", r"stem.\g<1>1."),
        (r"downsample\.0\.2\.(\w+)\.", r"stem.\g<1>2."),
        (r"downsample\.(\d)\.", r"stages.\1.downsample."),
        (r"stages\.(\d)\.(\d)\.mixer\.", r"stages.\1.blocks.\2."),
        (r"norm1\.", "head.norm."),
        (r"hidden\.", "head.pre_logits.fc."),
        (r"norm2\.", "head.pre_logits.norm."),
        (r"head\.", "head.fc."),
    )
    theirs = {}
    for name, value in model.state_dict().items():
        pattern, new = next(pair for pair in names if re.match(pair[0], name))
        theirs[re.sub("^" + pattern, new, name)] = value
    other = authors.load(MambaOut(**{**MambaOut.example, "classes": 3}).double(), theirs).eval()
    assert torch.equal(other(image(model)), model(image(model)))
