"""PATNet's own facts; what holds for every backbone is tested in test_backbones.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.models.patnet import PATNet


def small(**how):
    torch.manual_seed(0)
    model = PATNet(**{**PATNet.example, **how})
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * (torch.rand_like(tensor) if "var" in name else torch.randn_like(tensor)))
    return model.double().eval()


@pytest.mark.parametrize("spatial", [False, True])
def test_what_is_added_where(spatial):
    model = small(spatial=spatial)
    x = image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for number, stage in enumerate(model.stages):
        conv, norm = stage[0]
        x = norm(F.conv2d(x, conv.weight, stride=2 if number else 4))
        for block in stage[1:]:
            assert len(block.mlp) == 3 + spatial
            if number < 3:
                x = x + block.mlp(block.mixer(x))
            else:
                x = x + block.mixer(x)
                x = x + block.mlp(x)
    pooled = F.gelu(x.mean((2, 3)) @ model.features_conv.weight[:, :, 0, 0].T)
    torch.testing.assert_close(model(image), model.head(pooled))


def test_mlp():
    model = small(act="relu", spatial=False)
    mlp = model.stages[1][1].mlp
    x = torch.randn(1, 16, 3, 4, dtype=torch.float64)
    (conv, norm), out = mlp[0], mlp[2]
    assert conv.out_channels == 32 and conv.bias is None and out.bias is None
    torch.testing.assert_close(mlp(x), F.conv2d(norm(F.conv2d(x, conv.weight)).clamp(min=0), out.weight))


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="act is 'swish', must be one of 'gelu', 'relu'"):
        PATNet(act="swish")
