"""DaViT's own facts; the model equals the authors' golden file (tests/parity)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.davit import ChannelGroupAttention, DaViTWindowAttention
from heedful.models.davit import Block, DaViT, Merge


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def convolution(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
    return x + F.conv2d(x, conv.weight, conv.bias, padding=1, groups=x.shape[1])


def test_block_equals_transcription_with_gradients() -> None:
    """A block around the attention between channels: all of its steps, one group at a time."""
    torch.manual_seed(0)
    block = Block(6, ChannelGroupAttention(6, heads=2), 9).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    y = convolution(x, block.positions1)
    z = layer_norm(y, block.norm1).flatten(2).mT @ block.mixer.qkv.weight.T + block.mixer.qkv.bias
    q, k, v = z.split(6, -1)
    groups = []
    for own in (slice(0, 3), slice(3, 6)):
        weight = torch.einsum("bni,bnj->bij", k[..., own] / 3**0.5, v[..., own]).exp()
        weight = weight / weight.sum(-1, keepdim=True)
        groups.append(torch.einsum("bij,bnj->bni", weight, q[..., own]))
    z = torch.cat(groups, -1) @ block.mixer.proj.weight.T + block.mixer.proj.bias
    y = convolution(y + z.mT.unflatten(2, (4, 5)), block.positions2)
    z = layer_norm(y, block.norm2).movedim(1, -1) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    z = z * (1 + torch.erf(z / 2**0.5)) / 2
    literal = y + (z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias).movedim(-1, 1)
    torch.testing.assert_close(block(x), literal)
    wrt, up = (x, *block.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(block(x), wrt, up), torch.autograd.grad(literal, wrt, up))


def test_odd_maps_are_padded_at_the_right_and_the_bottom() -> None:
    merge = Merge(4, 6).double()
    x = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    full = x.new_zeros(1, 4, 6, 4)
    full[:, :, :5, :3] = merge.norm(x)
    torch.testing.assert_close(merge(x), merge.proj(full))


def test_pairs_are_local_then_channel_and_rates_grow_over_all_blocks() -> None:
    model = DaViT(**{**DaViT.example, "depths": (1, 1, 2, 1)}, drop_path=0.9)
    blocks = [block for stage in model.stages for pair in stage for block in pair]
    assert [type(b.mixer) for b in blocks] == [DaViTWindowAttention, ChannelGroupAttention] * 5
    assert [b.drop_path.rate for b in blocks] == pytest.approx([0.1 * i for i in range(10)])


def test_the_norm_comes_after_the_mean() -> None:
    torch.manual_seed(0)
    model = DaViT(**DaViT.example)
    x = torch.randn(2, 3, 64, 64)
    mean = model.features(x)[-1].mean((2, 3))
    mean = mean - mean.mean(1, keepdim=True)
    torch.testing.assert_close(
        model(x), model.head(mean / (mean.square().mean(1, keepdim=True) + 1e-5).sqrt())
    )


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is"):
        DaViT(heads=(3, 6))
