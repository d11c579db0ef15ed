"""VAN's own facts; what holds for every backbone is tested in test_backbones.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.models.van_lka import VAN, VANAttention, VANMlp


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def transcription(model: VAN, x: Tensor) -> Tensor:
    """The published steps, in training mode."""
    for stage, (down, blocks, norm) in enumerate(
        zip(model.downsample, model.stages, model.norms, strict=True)
    ):
        conv = down[0]
        x = F.conv2d(x, conv.weight, conv.bias, stride=2 if stage else 4, padding=1 if stage else 3)
        x = batch_norm(x, down[1])
        for block in blocks:
            dim = x.shape[1]
            z = batch_norm(x, block.norm1)
            u = gelu(pointwise(z, block.mixer.proj_in))
            near, far = block.mixer.lka.conv0, block.mixer.lka.conv_spatial
            a = F.conv2d(u, near.weight, near.bias, padding=2, groups=dim)
            a = F.conv2d(a, far.weight, far.bias, padding=9, dilation=3, groups=dim)
            a = u * pointwise(a, block.mixer.lka.conv1)
            x = x + block.scale1.gamma[:, None, None] * (pointwise(a, block.mixer.proj_out) + z)
            u = pointwise(batch_norm(x, block.norm2), block.mlp.fc1)
            u = F.conv2d(u, block.mlp.dwconv.weight, block.mlp.dwconv.bias, padding=1, groups=u.shape[1])
            x = x + block.scale2.gamma[:, None, None] * pointwise(gelu(u), block.mlp.fc2)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        x = (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    return x.mean((2, 3)) @ model.head.weight.T + model.head.bias


def test_equals_transcription_with_gradients() -> None:
    torch.manual_seed(0)
    model = VAN(classes=3, depths=(1, 2, 1, 1), dims=(4, 6, 8, 10), mlp_ratios=(2, 2, 3, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 70, 64, dtype=torch.float64, requires_grad=True)
    ours, literal = model(x), transcription(model, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *model.parameters()), torch.randn_like(ours)
    # A bias before a batch norm has no gradient but rounding: an absolute tolerance for those.
    torch.testing.assert_close(
        torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up), rtol=1e-6, atol=1e-8
    )


def test_the_attention_has_a_residual_of_its_own() -> None:
    attention = VANAttention(4)
    nn.init.zeros_(attention.proj_out.weight)
    nn.init.zeros_(attention.proj_out.bias)
    x = torch.randn(1, 4, 5, 6)
    assert torch.equal(attention(x), x)


def test_parameters_and_their_start() -> None:
    assert sum(p.numel() for p in VANAttention(8).parameters()) == 3 * (64 + 8) + 8 * (25 + 1) + 8 * (49 + 1)
    assert sum(p.numel() for p in VANMlp(8, 24).parameters()) == 9 * 24 + 10 * 24 + 25 * 8
    torch.manual_seed(0)
    block = VAN(depths=(1, 1, 1, 1)).stages[1][0]
    assert (block.scale1.gamma == 1e-2).all()
    far = block.mixer.lka.conv_spatial  # depthwise: a fan-out of 7 x 7
    assert abs(float(far.weight.detach().std()) - (2 / 49) ** 0.5) < 0.01
    assert not far.bias.any()
