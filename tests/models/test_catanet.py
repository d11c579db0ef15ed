"""CATANet as a whole: what is added where, any size, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.models.catanet import CATANet


def build(**how):
    torch.manual_seed(0)
    return CATANet(**{**CATANet.example, **how}).double().eval()


def shuffled(x, step):
    """Channel c step^2 + i step + j becomes pixel (i, j) of channel c."""
    b, c, h, w = x.shape
    x = x.view(b, c // step**2, step, step, h, w)
    return x.permute(0, 1, 4, 2, 5, 3).reshape(b, c // step**2, step * h, step * w)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_what_is_added_where(scale):
    model = build(scale=scale)
    x = torch.rand(1, 3, 12, 14, dtype=torch.float64)
    z = shallow = F.conv2d(x, model.first.weight, model.first.bias, padding=1)
    for tokens, patches, conv in model.blocks:
        z = z + F.conv2d(patches(tokens(z)), conv.weight, conv.bias, padding=1)
    z = z + shallow
    convs = [m for m in model.enlarge if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == (2 if scale == 4 else 1)
    for conv in convs:
        z = shuffled(F.conv2d(z, conv.weight, conv.bias, padding=1), 2 if scale == 4 else scale)
        z = torch.where(z > 0, z, 0.1 * z)
    base = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(x), F.conv2d(z, model.last.weight, model.last.bias, padding=1) + base)


@pytest.mark.parametrize("size", [(1, 1), (3, 30), (17, 23)])
def test_any_size(size):
    model = build()
    y = model(torch.rand(2, 3, *size, dtype=torch.float64))
    assert y.shape == (2, 3, 2 * size[0], 2 * size[1]) and y.isfinite().all()


def test_every_parameter_is_reached_and_centres_follow():
    model = build().train()
    y = model(**model.example_inputs(dtype=torch.float64))
    y.square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead
    assert all(bool(block[0].started) for block in model.blocks)
    model.eval()
    x = torch.rand(2, 3, 12, 14, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:], model(x[1:]))  # with stored centres rows are independent


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="scale is 5, must be one of 2, 3, 4"):
        CATANet(scale=5)
    with pytest.raises(ValueError, match="must be as long as group_sizes and patch_sizes"):
        CATANet(centres=(4, 4))
    with pytest.raises(ValueError, match="x has shape"):
        CATANet(**CATANet.example)(torch.zeros(1, 4, 8, 8))
