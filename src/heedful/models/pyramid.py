"""Backbones whose every stage stands behind a module that makes its map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from heedful.models.backbone import Backbone
from heedful.models.parts import drop_path_rates


class Pyramid(Backbone):
    """x = stage(downsample(x)), stage by stage; the head sees the mean of the normed last map.

    A model builds `downsample` and `stages`, as many of both, and `norm` unless `features_only`.
    """

    downsample: nn.ModuleList
    stages: nn.ModuleList
    norm: nn.Module

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        for downsample, stage in zip(self.downsample, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e"]:
        return self.norm(last).mean((2, 3))


def stages_of(
    block: Callable[[int, int, float], nn.Module], depths: Sequence[int], drop_path: float
) -> nn.ModuleList:
    """Stages of so many blocks, block(stage, place in the stage, rate of stochastic depth).

    drop_path: the rate of the last block, growing from 0.
    """
    return nn.ModuleList(
        nn.Sequential(*(block(stage, i, rate) for i, rate in enumerate(rates)))
        for stage, rates in enumerate(drop_path_rates(depths, drop_path))
    )
