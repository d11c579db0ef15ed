"""DHVT: a vision transformer for small data sets, with tokens of heads and convolutions in its MLP."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.heads.dhvt import HeadInteractedAttention
from heedful.models.backbone import Backbone, head
from heedful.models.parts import ConvNorm, DropPath, drop_path_rates, init_linear
from heedful.registry import register

CONFIGS = {
    "dhvt_tiny_cifar_patch4": {
        "parameters": 6_008_650,
        "size": 32,
        "arguments": {"classes": 100, "heads": 4, "patch": 4},
    },
    "dhvt_small_cifar_patch4": {
        "parameters": 23_425_450,
        "size": 32,
        "arguments": {"classes": 100, "dim": 384, "heads": 8, "patch": 4},
    },
    "dhvt_tiny_cifar_patch2": {
        "parameters": 5_845_162,
        "size": 32,
        "arguments": {"classes": 100, "heads": 4, "patch": 2},
    },
    "dhvt_small_cifar_patch2": {
        "parameters": 22_766_698,
        "size": 32,
        "arguments": {"classes": 100, "dim": 384, "heads": 8, "patch": 2},
    },
    "dhvt_tiny_imagenet": {"parameters": 6_267_334, "flops": "1.4G", "arguments": {}},
    "dhvt_small_imagenet": {
        "parameters": 24_040_606,
        "flops": "5.1G",
        "arguments": {"dim": 384, "heads": 6},
    },
}


@register("dhvt-backbone", kind="model", paper="dhvt", tags=("image", "heads"))
class DHVT(Backbone):
    """Vision transformer of overlapping patches; the head sees the class token. `features` gives one map.

        block:  x += attention(LN(x));   x += DAFF(LN(x))

    Patches come from strided convolutions between two affine maps of channels. There are no positions; the
    convolutions stand for them.

    classes, in_channels, features_only  see `Backbone`
    dim, depth, heads  channels, blocks, and heads of each; heads divide dim
    patch      reduction of the side, a power of 2
    mlp_ratio  width inside of DAFF, in dims
    drop_path  rate of stochastic depth in the last block, growing from 0

    Source: DHVT, arXiv 2210.05958.
    """

    example: ClassVar[dict[str, Any]] = {"classes": 10, "dim": 16, "depth": 2, "heads": 4, "patch": 8}
    exempt: ClassVar[dict[str, str]] = {
        "pyramid": "the last rescaling of the class token does not reach the map"
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        patch: int = 16,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        self.channels, self.reductions = (dim,), (patch,)
        self.embed = OverlappingPatches(in_channels, dim, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        (rates,) = drop_path_rates((depth,), drop_path)
        self.blocks = nn.ModuleList(Block(dim, heads, int(mlp_ratio * dim), rate) for rate in rates)
        if not features_only:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.head = head(dim, classes)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def tokens(self, x: Float[Tensor, "b c height width"]) -> tuple[Float[Tensor, "b n e"], tuple[int, int]]:
        """The class token and the patches after the last block, and the size of the map."""
        x = self.embed(x)
        size = (x.shape[2], x.shape[3])
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
        for block in self.blocks:
            x = block(x, size)
        return x, size

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        tokens, size = self.tokens(x)
        return [tokens[:, 1:].mT.unflatten(2, size)]

    def pooled(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e"]:
        return self.norm(self.tokens(x)[0][:, 0])


class Block(nn.Module):
    """Head-interacted attention and DAFF, each behind a norm."""

    def __init__(self, dim: int, heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = HeadInteractedAttention(dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = DAFF(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class DAFF(nn.Module):
    """An MLP of patches with a convolution inside, whose mean over the map rescales the class token.

        h = gelu(BN(W_1 p)),   p' = BN(W_2 (h + gelu(BN(DWConv3x3(h)))))
        class token' = class token * W_4 gelu(W_3 mean(p'))

    Takes tokens (b, 1 + height * width, c), class token first, and (height, width).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)
        self.compress = nn.Linear(dim, dim // 4)
        self.excitation = nn.Linear(dim // 4, dim)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        first, patches = x[:, :1], x[:, 1:].mT.unflatten(2, size)
        hidden = F.gelu(self.bn1(self.conv1(patches)))
        hidden = hidden + F.gelu(self.bn2(self.conv2(hidden)))
        patches = self.bn3(self.conv3(hidden)).flatten(2).mT
        scale = self.excitation(F.gelu(self.compress(patches.mean(1, keepdim=True))))
        return torch.cat([first * scale, patches], dim=1)


class OverlappingPatches(nn.Module):
    """Convolutions of stride 2 with norms, GELU between them, and an affine map of channels on each side."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        check_positive("patch", patch)
        steps = int(math.log2(patch))
        if patch != 2**steps or not steps:
            raise ValueError(f"patch is {patch}, must be a power of 2 of at least 2")
        widths = [in_channels, *(dim // 2 ** (steps - 1 - step) for step in range(steps))]
        self.before, self.after = Affine(in_channels), Affine(dim)
        self.convs = nn.ModuleList(ConvNorm(a, b, 3, stride=2) for a, b in pairwise(widths))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e rows columns"]:
        x = self.before(x)
        for step, conv in enumerate(self.convs):
            x = conv(x)
            if step < len(self.convs) - 1 or len(self.convs) == 1:
                x = F.gelu(x)
        return self.after(x)


class Affine(nn.Module):
    """y = alpha x + beta, channel by channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return x * self.alpha + self.beta
