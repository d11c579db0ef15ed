"""The pyramid of PVT: patches of patches with learned positions in four stages, whatever mixes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.models.backbone import Backbone, head
from heedful.models.parts import DropPath, LayerNorm2d, Mlp, drop_path_rates, init_linear, resize_table


class PVT(Backbone):
    """Four stages of equal blocks; the head sees the mean of the last map, without a norm.

        block:  x += mixer(LN(x));   x += mlp(LN(x))

    Maps that patches of 4 x 4, later 2 x 2, do not divide are padded with zeros (right, bottom); learned
    positions are interpolated to maps of another size than those of `image_size`.

    mixer       (stage, side of its map) -> a module that mixes maps
    depths      blocks of each stage
    dims        channels of each stage
    mlp_ratios  width of the MLP in each stage, in dims
    image_size  side of the images trained on
    drop_path   rate of stochastic depth in the last block, growing from 0
    """

    def __init__(
        self,
        mixer: Callable[[int, int], nn.Module],
        *,
        classes: int,
        in_channels: int,
        features_only: bool,
        depths: Sequence[int],
        dims: Sequence[int],
        mlp_ratios: Sequence[float],
        image_size: int,
        drop_path: float,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims, mlp_ratios=mlp_ratios)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        self.sides = [-(-image_size // reduction) for reduction in self.reductions]
        self.downsample = nn.ModuleList([Patches(in_channels, dims[0], 4)])
        self.downsample.extend(Patches(a, b, 2) for a, b in pairwise(dims))
        self.positions = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(1, side**2, dim), std=0.02)
            for side, dim in zip(self.sides, dims, strict=True)
        )
        rates = drop_path_rates(depths, drop_path)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(Block(dim, mixer(stage, side), int(mlp_ratios[stage] * dim), r) for r in rates[stage])
            )
            for stage, (dim, side) in enumerate(zip(dims, self.sides, strict=True))
        )
        if not features_only:
            self.head = head(dims[-1], classes)
        self.apply(init_linear)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        for part, table, side, stage in zip(
            self.downsample, self.positions, self.sides, self.stages, strict=True
        ):
            x = part(x)
            size = (x.shape[2], x.shape[3])
            positions = resize_table(table, (side, side), size, mode="bilinear")
            x = stage(x + positions.mT.unflatten(2, size))
            maps.append(x)
        return maps


class Patches(nn.Module):
    """A convolution of patches that do not overlap, and a norm."""

    def __init__(self, dim: int, out: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(dim, out, patch, stride=patch)
        self.norm = LayerNorm2d(out)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e h w"]:
        return self.norm(self.proj(F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))))


class Block(nn.Module):
    """A mixer of maps and an MLP, each behind a norm."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))
