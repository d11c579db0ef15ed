"""MaxViT: blocks of an inverted residual, attention in windows and attention over grids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive, check_stages
from heedful.mixers.grid.maxvit import MultiAxisAttention
from heedful.models.backbone import Backbone, head
from heedful.models.conv_parts import SqueezeExcite
from heedful.models.parts import DropPath, LayerNorm2d, Mlp
from heedful.registry import register

CONFIGS = {
    "maxvit_tiny": {"parameters": 30_916_528, "flops": "5.6G", "arguments": {}},
    "maxvit_small": {
        "parameters": 68_927_956,
        "flops": "11.7G",
        "arguments": {"dims": (96, 192, 384, 768)},
    },
    "maxvit_base": {
        "parameters": 119_467_708,
        "flops": "24.2G",
        "arguments": {"depths": (2, 6, 14, 2), "dims": (96, 192, 384, 768)},
    },
    "maxvit_large": {
        "parameters": 211_785_560,
        "flops": "43.9G",
        "arguments": {"depths": (2, 6, 14, 2), "dims": (128, 256, 512, 1024), "stem": 128},
    },
    "maxvit_xlarge": {
        "parameters": 474_951_952,
        "flops": "97.8G",
        "arguments": {"depths": (2, 6, 14, 2), "dims": (192, 384, 768, 1536), "stem": 192},
    },
}

GELU = partial(nn.GELU, approximate="tanh")


@register("maxvit-backbone", kind="model", paper="maxvit", tags=("image", "window", "sparse"))
class MaxViT(Backbone):
    """Image backbone whose every block sees its window, and the whole map through a grid.

        block:  x = mbconv(x);  x += window(LN(x));  x += mlp(LN(x));  x += grid(LN(x));  x += mlp(LN(x))

    The first block of a stage halves the map. The pooled vector goes through a layer norm, a linear map and
    tanh to the head.

    classes, in_channels, features_only  see `Backbone`
    depths     blocks of each stage
    dims       channels of each stage, multiples of head_dim
    stem       channels of the stem
    head_dim   width of a head
    window     side of a window in tokens
    grid       tokens of a grid along each side; see `resize` for images of another size
    drop_path  1 minus the paper's survival probability; the rate of block i of n is drop_path i / n

    Source: MaxViT, arXiv 2204.01697.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "stem": 8,
        "head_dim": 4,
        "window": 3,
        "grid": 2,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 5, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        stem: int = 64,
        head_dim: int = 32,
        window: int = 7,
        grid: int = 7,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(dims), depths=depths)
        check_positive("stem", stem)
        self.channels, self.reductions = tuple(dims), tuple(4 * 2**stage for stage in range(len(dims)))
        self.stem = nn.Sequential()
        self.stem.conv1 = SameConv(in_channels, stem, 3, stride=2)
        self.stem.norm1 = _norm(stem)
        self.stem.act = GELU()
        self.stem.conv2 = nn.Conv2d(stem, stem, 3, padding=1)
        self.stages = nn.ModuleList()
        before, done = stem, 0
        for depth, dim in zip(depths, dims, strict=True):
            blocks = nn.Sequential()
            for number in range(depth):
                blocks.append(
                    Block(
                        before,
                        dim,
                        stride=1 if number else 2,
                        head_dim=head_dim,
                        window=window,
                        grid=grid,
                        drop_path=drop_path * done / sum(depths),
                    )
                )
                before, done = dim, done + 1
            self.stages.append(blocks)
        if not features_only:
            self.norm = nn.LayerNorm(dims[-1])
            self.pre_logits = nn.Linear(dims[-1], dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # so that tokens are views of maps
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        return self.pre_logits(self.norm(last.mean((2, 3)))).tanh()

    def resize(self, size: int) -> None:
        """Windows and grids of this many tokens a side; their biases are interpolated (bilinear).

        For images of another size than those trained on: 7 at 224 pixels, 12 at 384, 16 at 512.
        """
        check_positive("size", size)
        for mixer in self.modules():
            if isinstance(mixer, MultiAxisAttention):
                table = F.interpolate(mixer.relative_bias.detach()[None], 2 * size - 1, mode="bilinear")
                mixer.relative_bias = nn.Parameter(table[0])
                mixer.size = size


class Block(nn.Module):
    """An inverted residual, then attention in windows, then over grids."""

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        stride: int,
        head_dim: int,
        window: int,
        grid: int,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = MBConv(dim, out, stride=stride, drop_path=drop_path)
        self.attn_block = Attention(out, head_dim, window, "block", drop_path)
        self.attn_grid = Attention(out, head_dim, grid, "grid", drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        return self.attn_grid(self.attn_block(self.conv(x)))


class MBConv(nn.Module):
    """An inverted residual with a norm in front: 1 x 1, depthwise 3 x 3, squeeze-excite, 1 x 1.

    The inner width is four times that of the output, and that of the squeeze a quarter of it.
    """

    def __init__(self, dim: int, out: int, *, stride: int, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = 4 * out
        self.stride = stride
        self.shortcut = nn.Identity() if dim == out else nn.Conv2d(dim, out, 1)
        self.pre_norm = _norm(dim)
        self.conv1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm1 = _norm(hidden)
        self.conv2 = SameConv(hidden, hidden, 3, stride=stride, groups=hidden, bias=False)
        self.norm2 = _norm(hidden)
        self.se = SqueezeExcite(hidden, max(1, out // 4), act=nn.SiLU)
        self.conv3 = nn.Conv2d(hidden, out, 1)
        self.act = GELU()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        y = self.act(self.norm1(self.conv1(self.pre_norm(x))))
        y = self.conv3(self.se(self.act(self.norm2(self.conv2(y)))))
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return self.shortcut(x) + self.drop_path(y)


class Attention(nn.Module):
    """Attention in one kind of groups, and an MLP."""

    def __init__(
        self, dim: int, head_dim: int, size: int, partition: Literal["block", "grid"], drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.mixer = MultiAxisAttention(dim, head_dim=head_dim, size=size, partition=partition)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act=GELU)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))


class SameConv(nn.Conv2d):
    """A convolution to ceil(side / stride); of the zeros around the map the odd one is at the end."""

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        pads: list[int] = []
        for side in (x.shape[3], x.shape[2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(dim: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=1e-3, momentum=0.01)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
