"""FocalNet: stages of focal modulation, of one map or of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive, check_stages
from heedful.mixers.grid.focalnet import FocalModulation
from heedful.models.backbone import head
from heedful.models.parts import DropPath, LayerNorm2d, LayerScale, Mlp, drop_path_rates
from heedful.models.pyramid import Pyramid
from heedful.registry import register

CONFIGS = {
    "focalnet_tiny_srf": {"parameters": 28_427_116, "flops": "4.4G", "arguments": {"levels": 2}},
    "focalnet_tiny_lrf": {"parameters": 28_647_928, "flops": "4.5G", "arguments": {}},
    "focalnet_small_srf": {
        "parameters": 49_891_216,
        "flops": "8.6G",
        "arguments": {"depths": (2, 2, 18, 2), "levels": 2},
    },
    "focalnet_small_lrf": {
        "parameters": 50_342_440,
        "flops": "8.7G",
        "arguments": {"depths": (2, 2, 18, 2)},
    },
    "focalnet_base_srf": {
        "parameters": 88_148_144,
        "flops": "15.3G",
        "arguments": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "levels": 2},
    },
    "focalnet_base_lrf": {
        "parameters": 88_749_768,
        "flops": "15.4G",
        "arguments": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024)},
    },
    "focalnet_tiny_iso": {
        "parameters": 5_880_280,
        "flops": "1.1G",
        "arguments": {"depths": (12,), "dims": (192,), "patch_size": 16},
    },
    "focalnet_small_iso": {
        "parameters": 22_376_344,
        "flops": "4.3G",
        "arguments": {"depths": (12,), "dims": (384,), "patch_size": 16},
    },
    "focalnet_base_iso": {
        "parameters": 87_237_400,
        "flops": "16.9G",
        "arguments": {
            "depths": (12,),
            "dims": (768,),
            "patch_size": 16,
            "postln": True,
            "layer_scale": 1e-4,
        },
    },
    "focalnet_large_fl3": {
        "parameters": 207_100_744,
        "arguments": {
            "depths": (2, 2, 18, 2),
            "dims": (192, 384, 768, 1536),
            "window": 5,
            "conv_embed": True,
            "postln": True,
            "layer_scale": 1e-4,
        },
    },
    "focalnet_large_fl4": {
        "parameters": 207_281_248,
        "arguments": {
            "depths": (2, 2, 18, 2),
            "dims": (192, 384, 768, 1536),
            "levels": 4,
            "normalize_modulator": True,
            "conv_embed": True,
            "postln": True,
            "layer_scale": 1e-4,
        },
    },
    "focalnet_xlarge_fl3": {
        "parameters": 366_082_120,
        "arguments": {
            "depths": (2, 2, 18, 2),
            "dims": (256, 512, 1024, 2048),
            "window": 5,
            "conv_embed": True,
            "postln": True,
            "layer_scale": 1e-4,
        },
    },
    "focalnet_xlarge_fl4": {
        "parameters": 366_322_784,
        "arguments": {
            "depths": (2, 2, 18, 2),
            "dims": (256, 512, 1024, 2048),
            "levels": 4,
            "conv_embed": True,
            "postln": True,
            "layer_scale": 1e-4,
        },
    },
    "focalnet_huge_fl3": {
        "parameters": 686_564_424,
        "arguments": {
            "depths": (2, 2, 18, 2),
            "dims": (352, 704, 1408, 2816),
            "conv_embed": True,
            "postln": True,
            "postln_in_modulation": True,
            "layer_scale": 1e-4,
        },
    },
    "focalnet_huge_fl4": {
        "parameters": 689_277_664,
        "arguments": {
            "depths": (2, 2, 18, 2),
            "dims": (352, 704, 1408, 2816),
            "levels": 4,
            "conv_embed": True,
            "postln": True,
            "postln_in_modulation": True,
            "layer_scale": 1e-4,
        },
    },
}


@register("focalnet-backbone", kind="model", paper="focalnet", tags=("image", "convolution", "gate"))
class FocalNet(Pyramid):
    """Image backbone whose mixer is focal modulation; one stage makes it isotropic.

        block:  x += gamma1 modulation(LN(x));   x += gamma2 mlp(LN(x)),   or with LN after instead of before

    A convolution and a norm make patches, and halve the map between stages; a map that patches do not fill is
    padded with zeros (right, bottom). The last map goes through a layer norm and a mean to the head.

    classes, in_channels, features_only  see `Backbone`
    depths      blocks of each stage
    dims        channels of each stage
    levels      number of convolutions of the modulation: one number, or one for each stage
    window      side of the first of them
    mlp_ratio   width of the MLP, in dims
    patch_size  side of a patch of the image
    conv_embed  patches overlap: 7 x 7 at stride 4, then 3 x 3 at stride 2
    postln      norms come after modulation and MLP
    layer_scale where the gammas start; None: no gammas
    normalize_modulator, postln_in_modulation  see `FocalModulation`
    drop_path   rate of stochastic depth in the last block, growing from 0

    Source: Focal Modulation Networks, arXiv 2203.11926.
    """

    example: ClassVar[dict[str, Any]] = {"classes": 10, "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        levels: int | Sequence[int] = 3,
        window: int = 3,
        mlp_ratio: float = 4,
        patch_size: int = 4,
        conv_embed: bool = False,
        postln: bool = False,
        layer_scale: float | None = None,
        normalize_modulator: bool = False,
        postln_in_modulation: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_positive("patch_size", patch_size)
        levels = [levels] * len(dims) if isinstance(levels, int) else levels
        check_stages(len(dims), depths=depths, levels=levels)
        if conv_embed and patch_size != 4:
            raise ValueError(f"patch_size is {patch_size}, must be 4 with conv_embed")
        self.channels = tuple(dims)
        self.reductions = tuple(patch_size * 2**stage for stage in range(len(dims)))
        stem, halve = ((7, 2), (3, 1)) if conv_embed else ((patch_size, 0), (2, 0))
        self.downsample = nn.ModuleList([Embed(in_channels, dims[0], stem[0], patch_size, stem[1])])
        self.downsample.extend(Embed(a, b, halve[0], 2, halve[1]) for a, b in pairwise(dims))
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            blocks = nn.Sequential()
            for rate in rates[stage]:
                mixer = FocalModulation(
                    dim,
                    levels=levels[stage],
                    window=window,
                    normalize_modulator=normalize_modulator,
                    postln=postln_in_modulation,
                )
                blocks.append(
                    Block(
                        dim,
                        mixer,
                        int(mlp_ratio * dim),
                        postln=postln,
                        layer_scale=layer_scale,
                        drop_path=rate,
                    )
                )
            self.stages.append(blocks)
        if not features_only:
            self.norm = LayerNorm2d(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        # Channels last: tokens are then views of maps.
        return super().features(x.contiguous(memory_format=torch.channels_last))


class Block(nn.Module):
    """A mixer of maps and an MLP, with norms before them, or after them."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        hidden: int,
        *,
        postln: bool,
        layer_scale: float | None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.postln = postln
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, init=layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, init=layer_scale, axis=-1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        y = self.norm1(self.mixer(x)) if self.postln else self.mixer(self.norm1(x))
        x = x + self.drop_path(self.scale1(y))
        tokens = x.movedim(1, -1)
        y = self.norm2(self.mlp(tokens)) if self.postln else self.mlp(self.norm2(tokens))
        return x + self.drop_path(self.scale2(y).movedim(-1, 1))


class Embed(nn.Module):
    """A strided convolution, then a norm; a map that patches without overlap do not fill is padded."""

    def __init__(self, dim: int, out: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, kernel, stride=stride, padding=padding)
        self.norm = LayerNorm2d(out)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        if self.proj.kernel_size == self.proj.stride:
            side = self.proj.stride[0]
            x = F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side))
        return self.norm(self.proj(x))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
