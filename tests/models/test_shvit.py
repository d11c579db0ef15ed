"""SHViT's own facts; what holds for every backbone is tested in test_backbones.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from heedful import authors
from heedful.models.conv_parts import PatchMerging, depthwise
from heedful.models.shvit import SHViT


def batch_norm(x: Tensor, norm: nn.Module) -> Tensor:
    mean, variance, weight, bias = (
        t.view(-1, *[1] * (x.ndim - 2)) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def conv(x: Tensor, part: nn.Module, stride: int = 1) -> Tensor:
    """A convolution without bias and its norm."""
    layer, norm = part
    weight = layer.weight
    return batch_norm(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, layer.groups), norm)


def ffn(x: Tensor, part: nn.Module) -> Tensor:
    return conv(conv(x, part.pw1).clamp(min=0), part.pw2)


def pair(x: Tensor, part: nn.Module) -> Tensor:
    x = x + conv(x, part[0].module)
    return x + ffn(x, part[1].module)


def merging(x: Tensor, part: nn.Module) -> Tensor:
    x = conv(conv(x, part.conv1).clamp(min=0), part.conv2, stride=2).clamp(min=0)
    gate = x.mean((2, 3)) @ part.se.fc1.weight[:, :, 0, 0].T + part.se.fc1.bias
    gate = gate.clamp(min=0) @ part.se.fc2.weight[:, :, 0, 0].T + part.se.fc2.bias
    return conv(x / (1 + (-gate).exp())[:, :, None, None], part.conv3)


def attention(x: Tensor, m: nn.Module) -> Tensor:
    part, rest = x[:, : m.partial_dim], x[:, m.partial_dim :]
    mean = part.mean((1, 2, 3), keepdim=True)
    variance = (part - mean).square().mean((1, 2, 3), keepdim=True)
    part = (part - mean) / (variance + 1e-5).sqrt() * m.pre_norm.weight[:, None, None]
    part = part + m.pre_norm.bias[:, None, None]
    q, k, v = conv(part, m.qkv).flatten(2).split([m.qk_dim, m.qk_dim, m.partial_dim], 1)
    weight = (torch.einsum("bdi,bdj->bij", q, k) / m.qk_dim**0.5).exp()
    weight = weight / weight.sum(-1, keepdim=True)
    mixed = torch.einsum("bij,bdj->bdi", weight, v).unflatten(2, x.shape[2:])
    return conv(torch.cat([mixed, rest], 1).clamp(min=0), m.proj[1])


def transcription(model: SHViT, x: Tensor) -> Tensor:
    for i in (0, 2, 4, 6):
        x = conv(x, model.stem[i], stride=2)
        x = x.clamp(min=0) if i < 6 else x
    for number, stage in enumerate(model.stages):
        blocks = list(stage)
        if number:
            x = pair(merging(pair(x, blocks[0]), blocks[1]), blocks[2])
            blocks = blocks[3:]
        for block in blocks:
            x = x + conv(x, block.conv.module)
            if number:
                x = x + attention(x, block.mixer.module)
            x = x + ffn(x, block.ffn.module)
    return batch_norm(x.mean((2, 3)), model.norm) @ model.head.weight.T + model.head.bias


def small() -> SHViT:
    torch.manual_seed(0)
    model = SHViT(classes=3, depths=(1, 2, 1), dims=(8, 10, 12), partial_dims=(0, 4, 5), qk_dim=3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(
                    (0.3 * torch.randn_like(tensor)).abs() if "var" in name else torch.randn_like(tensor) / 3
                )
    return model.double().eval()


def test_equals_transcription_with_gradients() -> None:
    model = small()
    x = torch.randn(2, 3, 85, 96, dtype=torch.float64, requires_grad=True)
    ours, literal = model(x), transcription(model, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *model.parameters()), torch.randn_like(ours)
    # The bias of all keys changes nothing: its gradient is rounding, hence the absolute tolerance.
    torch.testing.assert_close(
        torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up), rtol=1e-6, atol=1e-8
    )


def test_the_network_starts_as_stem_and_merges() -> None:
    torch.manual_seed(0)
    model = SHViT(classes=3, depths=(1, 2, 1), dims=(8, 10, 12), partial_dims=(0, 4, 5)).eval()
    x = torch.randn(2, 3, 64, 64)
    y = model.stem(x)
    for stage in model.stages[1:]:
        y = stage[1](y)
    torch.testing.assert_close(model.features(x)[-1], y)


def test_a_norm_folds_into_its_convolution_and_the_residual_into_its_centre() -> None:
    torch.manual_seed(0)
    residual = depthwise(6).double()
    nn.init.normal_(residual.module.norm.weight)
    residual.module.norm.running_mean.normal_()
    residual.eval()
    folded = fuse_conv_bn_eval(residual.module.conv, residual.module.norm)
    with torch.no_grad():
        folded.weight[:, :, 1, 1] += 1
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(folded(x), residual(x))


def test_squeeze_excite_is_as_wide_as_a_multiple_of_8() -> None:
    assert [PatchMerging(dim, 8).se.fc1.out_channels for dim in (4, 24, 308, 350)] == [8, 24, 312, 352]


def test_names_of_the_squeeze_excite_as_timm_had_them_once() -> None:
    model = small()
    names = {
        "stem.0.conv.weight": "patch_embed.0.c.weight",
        "stages.1.1.se.fc1.bias": "blocks2.1.se.conv_reduce.bias",
    }
    table = authors.table_of(type(model))
    for ours, theirs in names.items():
        assert list(table.apply({theirs: torch.zeros(1)})) == [ours]


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="partial_dims is"):
        SHViT(partial_dims=(0, 1))
    with pytest.raises(ValueError, match="must start with a multiple of 8"):
        SHViT(dims=(12, 16, 16))
