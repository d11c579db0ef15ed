"""MSVMamba's frame: merging of tokens, the order inside a block, the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from heedful.models.msvmamba import Merge, MSVMamba
from heedful.testing.check_backbone import image, make


def norm(x, layer):
    """Over the last axis."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def norm2d(x, layer):
    return norm(x.permute(0, 2, 3, 1), layer).permute(0, 3, 1, 2)


def merge(m: Merge, x):
    """Square by square; what is outside the map is zero."""
    b, c, height, width = x.shape
    rows = []
    for i in range(0, height, 2):
        row = []
        for j in range(0, width, 2):
            four = [
                x[:, :, i + p, j + q] if i + p < height and j + q < width else x.new_zeros(b, c)
                for p, q in ((0, 0), (1, 0), (0, 1), (1, 1))
            ]
            row.append(norm(torch.cat(four, 1), m.norm) @ m.reduction.weight.T)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def test_equals_transcription():
    model = make(MSVMamba)
    x = given = image(model, size=(38, 53))
    for stage, (part, blocks) in enumerate(zip(model.downsample, model.stages, strict=True)):
        x = (
            norm2d(F.conv2d(x, part[0].weight, part[0].bias, stride=4), part[1])
            if stage == 0
            else merge(part, x)
        )
        block = blocks[0]
        x = x + block.mixer(norm2d(x, block.norm1))
        m = block.mlp
        h = F.conv2d(norm2d(x, block.norm2), m.fc1.weight, m.fc1.bias)
        h = F.gelu(h + F.conv2d(h, m.dwconv.weight, m.dwconv.bias, padding=1, groups=h.shape[1]))
        x = x + F.conv2d(h, m.fc2.weight, m.fc2.bias)
        torch.testing.assert_close(model.features(given)[stage], x)
    y = norm2d(x, model.norm).mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(given), y)


def test_maps_have_half_the_sides_rounded_up():
    maps = make(MSVMamba).features(torch.zeros(1, 3, 39, 53, dtype=torch.float64))
    assert [tuple(y.shape[2:]) for y in maps] == [(9, 13), (5, 7), (3, 4), (2, 2)]
