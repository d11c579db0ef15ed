"""MetaFormer: the architecture of a transformer around any mixer of maps. PoolFormer: the one with pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_positive, check_stages
from heedful.mixers.grid.spatial_fc import SpatialFC
from heedful.models.backbone import head
from heedful.models.parts import ConvMlp, DropPath, LayerNorm2d, LayerScale, drop_path_rates
from heedful.models.pyramid import Pyramid
from heedful.registry import create, register

CONFIGS = {
    "poolformer_s12": {"parameters": 11_915_176, "flops": "1.8G", "arguments": {"depths": (2, 2, 6, 2)}},
    "poolformer_s24": {"parameters": 21_388_968, "flops": "3.4G", "arguments": {"depths": (4, 4, 12, 4)}},
    "poolformer_s36": {
        "parameters": 30_862_760,
        "flops": "5.0G",
        "arguments": {"depths": (6, 6, 18, 6), "layer_scale": 1e-6},
    },
    "poolformer_m36": {
        "parameters": 56_172_520,
        "flops": "8.8G",
        "arguments": {"depths": (6, 6, 18, 6), "dims": (96, 192, 384, 768), "layer_scale": 1e-6},
    },
    "poolformer_m48": {
        "parameters": 73_473_448,
        "flops": "11.6G",
        "arguments": {"depths": (8, 8, 24, 8), "dims": (96, 192, 384, 768), "layer_scale": 1e-6},
    },
    "metaformer_id_s12": {
        "parameters": 11_915_176,
        "arguments": {"mixers": ("identity", "identity", "identity", "identity")},
    },
    "metaformer_pppa_s12": {
        "parameters": 14_038_440,
        "arguments": {
            "mixers": ("poolformer", "poolformer", "poolformer", "metaformer-attention"),
            "norm": "layer",
            "positions": 3,
        },
    },
    "metaformer_ppaa_s12": {
        "parameters": 16_535_592,
        "arguments": {
            "mixers": ("poolformer", "poolformer", "metaformer-attention", "metaformer-attention"),
            "norm": "layer",
            "positions": 2,
        },
    },
    "metaformer_pppf_s12": {
        "parameters": 11_919_978,
        "arguments": {
            "mixers": ("poolformer", "poolformer", "poolformer", "spatial-fc"),
            "norm": "layer",
        },
    },
    "metaformer_ppff_s12": {
        "parameters": 12_150_474,
        "arguments": {
            "mixers": ("poolformer", "poolformer", "spatial-fc", "spatial-fc"),
            "norm": "layer",
        },
    },
}

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda dim: nn.GroupNorm(1, dim),
    "layer": LayerNorm2d,
}
REDUCTIONS = (4, 8, 16, 32)


@register(
    "metaformer-poolformer-backbone",
    kind="model",
    paper="metaformer-poolformer",
    tags=("image", "pooling"),
    aliases=("metaformer", "poolformer-backbone"),
)
class MetaFormer(Pyramid):
    """Image backbone of four stages of transformer blocks whose mixer of tokens is left open.

        block:  x += gamma1 mixer(norm(x));   x += gamma2 mlp(norm(x))

    A 7 x 7 convolution with stride 4 and a 3 x 3 one with stride 2 before each further stage, without norms.
    The last map goes through a norm and a mean to the head; the maps of `features_only` have a norm each.

    classes, in_channels, features_only  see `Backbone`
    depths       blocks of each stage
    dims         channels of each stage
    mixers       one a stage: the name of a registered grid mixer, "identity", or a function dim -> module
    norm         "group": over channels and tokens together; "layer": over the channels of a token
    positions    stage (from 0) before which learned positions are added, or None
    image_size   side of the images that the positions and a "spatial-fc" are for; others are interpolated
    mlp_ratio    width of the MLP, in dims
    layer_scale  where the gammas start
    drop_path    rate of stochastic depth in the last block, growing from 0

    Source: MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418; the defaults are PoolFormer's.
    """

    example: ClassVar[dict[str, Any]] = {"classes": 10, "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mixers: Sequence[str | Callable[[int], nn.Module]] = ("poolformer",) * 4,
        norm: str = "group",
        positions: int | None = None,
        image_size: int = 224,
        mlp_ratio: float = 4,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_choice("norm", norm, tuple(NORMS))
        check_positive("image_size", image_size)
        check_stages(len(REDUCTIONS), depths=depths, dims=dims, mixers=mixers)
        self.channels, self.reductions = tuple(dims), REDUCTIONS
        self.downsample = nn.ModuleList([nn.Conv2d(in_channels, dims[0], 7, stride=4, padding=2)])
        self.downsample.extend(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(dims))
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, (dim, reduction) in enumerate(zip(dims, REDUCTIONS, strict=True)):
            size = (image_size // reduction,) * 2
            blocks = nn.Sequential()
            if stage == positions:
                blocks.append(Positions(dim, size))
            for rate in rates[stage]:
                blocks.append(
                    MetaFormerBlock(
                        dim,
                        _mixer(mixers[stage], dim, size),
                        ConvMlp(dim, int(mlp_ratio * dim)),
                        norm=NORMS[norm],
                        layer_scale=layer_scale,
                        drop_path=rate,
                    )
                )
            self.stages.append(blocks)
        if features_only:
            self.norms = nn.ModuleList(NORMS[norm](dim) for dim in dims)
        else:
            self.norm = NORMS[norm](dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = super().features(x)
        if self.features_only:
            maps = [norm(y) for norm, y in zip(self.norms, maps, strict=True)]
        return maps


class MetaFormerBlock(nn.Module):
    """A mixer of maps and an MLP, each behind a norm and scaled a channel.

    x += gamma1 mixer(norm1(x));   x += gamma2 mlp(norm2(x))
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        *,
        norm: Callable[[int], nn.Module],
        layer_scale: float,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.mixer = mixer
        self.scale1 = LayerScale(dim, init=layer_scale)
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.scale2 = LayerScale(dim, init=layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class Positions(nn.Module):
    """A learned table added to a map, interpolated (bicubic) where the map has another size."""

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, dim, *size))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        if x.shape[2:] == self.table.shape[2:]:
            return x + self.table
        return x + F.interpolate(self.table, size=x.shape[2:], mode="bicubic", align_corners=False)


def _mixer(kind: str | Callable[[int], nn.Module], dim: int, size: tuple[int, int]) -> nn.Module:
    if not isinstance(kind, str):
        return kind(dim)
    if kind == "identity":
        return nn.Identity()
    return SpatialFC(dim, size=size) if kind == "spatial-fc" else create(kind, dim)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
