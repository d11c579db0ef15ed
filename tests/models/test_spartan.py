"""SpaRTAN's own facts; what holds for every backbone is tested in test_backbones.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heedful.models.spartan import SpaRTAN


def group_norm(x, layer):
    mean = x.mean((1, 2, 3), keepdim=True)
    var = (x - mean).square().mean((1, 2, 3), keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def test_what_is_added_where():
    torch.manual_seed(0)
    model = SpaRTAN(**SpaRTAN.example)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    model.double().eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    y = model(x)
    for conv, norm, _ in model.stem:
        x = F.gelu(norm(F.conv2d(x, conv.weight, stride=2, padding=1)))
    for number, stage in enumerate(model.stages):
        blocks = list(stage)
        if number:
            x = F.silu(blocks[0].norm(F.conv2d(x, blocks[0].conv.weight, stride=2)))
            blocks = blocks[2:]
        for block in blocks:
            x = x + block.scale1 * block.smixer(group_norm(x, block.norm1))
            x = x + block.scale2 * block.cmixer(group_norm(x, block.norm2))
    torch.testing.assert_close(y, model.head(x.mean((2, 3))))


def test_groups_and_rates():
    model = SpaRTAN(drop_path=0.1)
    blocks = [b for stage in model.stages for b in stage if hasattr(b, "cmixer")]
    rates = [b.drop_path.rate for b in blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.arange(20) / 200)
    assert [s[-1].smixer.near[0].groups for s in model.stages] == [1, 1, 64, 128]
    assert [s[-1].cmixer.conv[0].groups for s in model.stages] == [128, 256, 128, 256]


def test_initial_values():
    torch.manual_seed(0)
    model = SpaRTAN()
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 5000:
            fan = conv.weight[0, 0].numel() * conv.out_channels / conv.groups
            assert (
                abs(float(conv.weight.detach().std()) * (fan / 2) ** 0.5 - 1) < 0.05
            )  # 5 deviations of 5000 draws
    block = model.stages[0][0]
    assert bool((block.scale1 == 1e-5).all()) and bool((block.scale2 == 1e-5).all())


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="expand is"):
        SpaRTAN(expand=(4, 4))
