"""BEVANet: real-time segmentation by a semantic and a detail branch of large separable kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive, check_stages
from heedful.models.bevanet_parts import (
    BoundaryGuidedFusion,
    EVABlock,
    PixelAttentionFusion,
    PyramidPooling,
    SegmentHead,
    enlarged,
)
from heedful.models.parts import ConvNorm, LayerNorm2d
from heedful.registry import Entry, register

# Parameters of training; auxiliary=False leaves out two heads.
CONFIGS = {
    "bevanet": {"parameters": 58_823_892, "arguments": {}},
    "bevanet_s": {"parameters": 15_186_004, "arguments": {"dim": 32, "depths": (2, 2, 3)}},
    "bevanet_s_camvid": {
        "parameters": 15_183_940,
        "arguments": {"dim": 32, "depths": (2, 2, 3), "classes": 11},
    },
    "bevanet_l": {
        "parameters": 60_203_732,
        "arguments": {"depths": (3, 3, 4), "pooling": 112, "head": 256},
    },
    "bevanet_ade": {"parameters": 58_857_690, "arguments": {"classes": 150}},
}


@register("bevanet", kind="model", paper="bevanet", tags=("image", "segmentation", "conv"))
class BEVANet(nn.Module):
    """An image in, the classes of its pixels out, at an eighth of the image's side.

        stem, to an eighth;   semantic branch to a sixty-fourth, then pyramid pooling
        detail branch at an eighth, twice fused with the semantic one;   a boundary branch from it
        y = head(fusion of detail, semantic and boundary)

    In training with `auxiliary`, forward gives (auxiliary classes, y, boundary logits); else y.

    classes      of pixels
    in_channels  of the image
    dim          channels of the first stage
    depths       residual blocks of the stages at a quarter, an eighth and a sixteenth
    pooling      channels inside of the pyramid pooling
    head         channels inside of the heads of classes
    kernels      reach of the attention in the semantic branch's two last stages and in the detail branch
    auxiliary    build the heads that help in training

    Any size of image. In training more than one image is needed. Source: BEVANet, arXiv 2508.07300.
    """

    entry: ClassVar[Entry]
    example: ClassVar[dict[str, Any]] = {
        "classes": 5,
        "dim": 8,
        "depths": (2, 2, 2),
        "pooling": 8,
        "head": 8,
        "kernels": (11, 11, 7),
    }

    def __init__(
        self,
        *,
        classes: int = 19,
        in_channels: int = 3,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 4),
        pooling: int = 96,
        head: int = 128,
        kernels: Sequence[int] = (35, 35, 23),
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("classes", classes), ("in_channels", in_channels), ("dim", dim)):
            check_positive(name, value)
        check_stages(3, depths=depths, kernels=kernels)
        self.in_channels = in_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            _stage(dim, dim, depths[0]),
            nn.ReLU(),
            _stage(dim, 2 * dim, depths[1], stride=2),
            nn.ReLU(),
        )
        self.semantic3 = nn.Sequential(_stage(2 * dim, 4 * dim, depths[2], stride=2), nn.ReLU())
        self.semantic4 = _attentive(4 * dim, 8 * dim, kernels[0], blocks=2, stride=2)
        self.semantic5 = _attentive(8 * dim, 16 * dim, kernels[1], blocks=2, stride=2)
        self.pooling = PyramidPooling(16 * dim, pooling, 4 * dim)

        self.detail3 = _stage(2 * dim, 2 * dim, depths[0])
        self.compress3, self.compress4 = ConvNorm(4 * dim, 2 * dim), ConvNorm(8 * dim, 2 * dim)
        self.fuse3, self.fuse4 = (PixelAttentionFusion(2 * dim, dim) for _ in range(2))
        self.detail4 = _attentive(2 * dim, 2 * dim, kernels[2], blocks=1)
        self.detail5, self.boundary5 = Bottleneck(2 * dim, 2 * dim), Bottleneck(2 * dim, 2 * dim)

        self.fusion = BoundaryGuidedFusion(4 * dim, 4 * dim)
        self.head = SegmentHead(4 * dim, head, classes)
        self.auxiliary_head = SegmentHead(2 * dim, head, classes) if auxiliary else None
        self.boundary_head = SegmentHead(2 * dim, dim, 1) if auxiliary else None

    def forward(
        self, x: Float[Tensor, "b c height width"]
    ) -> Float[Tensor, "b k height8 width8"] | tuple[Tensor, Tensor, Tensor]:
        check_map("x", x, self.in_channels, (2,))
        x = self.stem(x)
        semantic, detail = self.semantic3(x), self.detail3(x)
        first = self.fuse3(detail, self.compress3(semantic))
        semantic, detail = self.semantic4(semantic), self.detail4(F.relu(first))
        second = self.fuse4(detail, self.compress4(semantic))
        semantic = enlarged(self.pooling(self.semantic5(semantic)), second)
        y = self.head(self.fusion(self.detail5(second), semantic, self.boundary5(second)))
        if not self.training or self.auxiliary_head is None or self.boundary_head is None:
            return y
        return self.auxiliary_head(first), y, self.boundary_head(second)

    def example_inputs(
        self, *, batch: int = 2, size: tuple[int, int] = (64, 96), dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        return {"x": torch.randn(batch, self.in_channels, *size, generator=generator).to(dtype)}


class BasicBlock(nn.Module):
    """x + BN(conv3x3(relu(BN(conv3x3(x))))), with a ReLU behind it unless it is the last of a stage."""

    def __init__(self, dim: int, out: int, *, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(dim, out, 3, stride=stride), ConvNorm(out, out, 3)
        self.shortcut = nn.Identity() if stride == 1 and dim == out else ConvNorm(dim, out, stride=stride)
        self.act = act

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e height2 width2"]:
        y = self.shortcut(x) + self.second(F.relu(self.first(x)))
        return F.relu(y) if self.act else y


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, then 1 x 1 to twice the channels, beside a 1 x 1 shortcut; no ReLU behind."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(dim, hidden), ConvNorm(hidden, hidden, 3)
        self.third, self.shortcut = ConvNorm(hidden, 2 * hidden), ConvNorm(dim, 2 * hidden)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e height width"]:
        return self.shortcut(x) + self.third(F.relu(self.second(F.relu(self.first(x)))))


def _stage(dim: int, out: int, depth: int, *, stride: int = 1) -> nn.Sequential:
    """Residual blocks, the last without a ReLU unless it is alone."""
    blocks = [BasicBlock(dim, out, stride=stride)]
    blocks += [BasicBlock(out, out, act=number < depth - 1) for number in range(1, depth)]
    return nn.Sequential(*blocks)


def _attentive(dim: int, out: int, kernel: int, *, blocks: int, stride: int = 1) -> nn.Sequential:
    """A residual block, then attention blocks, each with a norm over the channels."""
    parts: list[nn.Module] = [BasicBlock(dim, out, stride=stride)]
    for _ in range(blocks):
        parts += [EVABlock(out, kernel=kernel), LayerNorm2d(out)]
    return nn.Sequential(*parts)
