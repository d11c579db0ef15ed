"""MetaFormer's own facts; what holds for every backbone is tested in test_backbones.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful.mixers.grid.metaformer_attention import MetaFormerAttention
from heedful.mixers.grid.spatial_fc import SpatialFC
from heedful.models.metaformer_poolformer import MetaFormer


def with_gradients(module: nn.Module, x: Tensor, ours: Tensor, literal: Tensor) -> None:
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *module.parameters()), torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Mean and variance over channels and tokens of an image together."""
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def poolformer(model: MetaFormer, x: Tensor) -> Tensor:
    """The published steps, with a pool made of shifted sums."""
    for stage, (down, blocks) in enumerate(zip(model.downsample, model.stages, strict=True)):
        x = F.conv2d(x, down.weight, down.bias, stride=2 if stage else 4, padding=1 if stage else 2)
        for block in blocks:
            y = group_norm(x, block.norm1)
            height, width = y.shape[2:]
            inside = F.pad(torch.ones_like(y), (1, 1, 1, 1))
            padded = F.pad(y, (1, 1, 1, 1))
            total = sum(padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3))
            count = sum(inside[..., i : i + height, j : j + width] for i in range(3) for j in range(3))
            x = x + block.scale1.gamma[:, None, None] * (total / count - y)
            y = group_norm(x, block.norm2)
            y = torch.einsum("oc,bchw->bohw", block.mlp.fc1.weight[:, :, 0, 0], y)
            y = y + block.mlp.fc1.bias[:, None, None]
            y = y * (1 + torch.erf(y / 2**0.5)) / 2
            y = torch.einsum("oc,bchw->bohw", block.mlp.fc2.weight[:, :, 0, 0], y)
            y = y + block.mlp.fc2.bias[:, None, None]
            x = x + block.scale2.gamma[:, None, None] * y
    return group_norm(x, model.norm).mean((2, 3)) @ model.head.weight.T + model.head.bias


def test_poolformer_equals_transcription_with_gradients() -> None:
    torch.manual_seed(0)
    model = MetaFormer(classes=3, depths=(1, 2, 1, 1), dims=(4, 6, 8, 10), layer_scale=0.7).double()
    x = torch.randn(2, 3, 70, 64, dtype=torch.float64, requires_grad=True)
    with_gradients(model, x, model(x), poolformer(model, x))


def test_attention_equals_transcription_with_gradients() -> None:
    torch.manual_seed(0)
    mixer = MetaFormerAttention(6, head_dim=3, dtype=torch.float64)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    rows = []
    for image in x:
        q, k, v = (image.flatten(1).T @ mixer.qkv.weight.T).split(6, -1)
        heads = []
        for own in (slice(0, 3), slice(3, 6)):
            weight = (q[:, own] @ k[:, own].T / 3**0.5).exp()
            heads.append(weight @ v[:, own] / weight.sum(-1, keepdim=True))
        rows.append((torch.cat(heads, -1) @ mixer.proj.weight.T + mixer.proj.bias).T.unflatten(1, (3, 4)))
    with_gradients(mixer, x, mixer(x), torch.stack(rows))
    assert sum(p.numel() for p in mixer.parameters()) == 4 * 6 * 6 + 6


def test_spatial_fc_mixes_tokens_row_by_row() -> None:
    torch.manual_seed(0)
    mixer = SpatialFC(3, size=(2, 4), dtype=torch.float64)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    literal = torch.stack(
        [
            sum(mixer.fc.weight[4 * i + j, 4 * r + s] * x[:, :, r, s] for r in range(2) for s in range(4))
            for i in range(2)
            for j in range(4)
        ],
        -1,
    )
    with_gradients(mixer, x, mixer(x), literal.unflatten(-1, (2, 4)))


def test_spatial_fc_of_a_constant_map_is_as_large_as_the_map() -> None:
    mixer = SpatialFC(1, size=(2, 2), dtype=torch.float64)
    with torch.no_grad():
        mixer.fc.weight.fill_(0.25)  # the mean
    y = mixer(torch.full((1, 1, 5, 3), 2.0, dtype=torch.float64))
    torch.testing.assert_close(y, torch.full_like(y, 2.0))


def test_positions_come_before_their_stage_and_start_at_zero() -> None:
    torch.manual_seed(0)
    how = {"classes": 2, "depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4), "image_size": 64}
    plain, placed = MetaFormer(**how), MetaFormer(**how, positions=2)
    table = placed.stages[2][0].table
    assert table.shape == (1, 4, 4, 4)
    state = {n: t for n, t in placed.state_dict().items() if not n.startswith("stages.2.0.")}
    plain.load_state_dict({n.replace("stages.2.1.", "stages.2.0."): t for n, t in state.items()})
    for size in (64, 96):
        x = torch.randn(1, 3, size, size)
        torch.testing.assert_close(placed(x), plain(x))
    with torch.no_grad():
        table.normal_()
    assert not torch.allclose(placed(x), plain(x))


def test_any_mixer_has_a_place() -> None:
    def mixer(dim: int) -> nn.Module:
        return nn.Conv2d(dim, dim, 3, padding=1)

    model = MetaFormer(
        classes=2, depths=(1,) * 4, dims=(8,) * 4, mixers=("identity", "van-lka", mixer, "focalnet")
    )
    assert [type(stage[0].mixer).__name__ for stage in model.stages] == [
        "Identity",
        "LargeKernelAttention",
        "Conv2d",
        "FocalModulation",
    ]
    assert model(torch.randn(1, 3, 40, 40)).shape == (1, 2)


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="norm is 'batch', must be one of"):
        MetaFormer(norm="batch")
    with pytest.raises(ValueError, match="mixers is"):
        MetaFormer(mixers=("identity",))
    with pytest.raises(ValueError, match="head_dim is 5, must divide dim"):
        MetaFormerAttention(16, head_dim=5)
    with pytest.raises(ValueError, match="size is 0"):
        SpatialFC(4, size=(0, 2))
