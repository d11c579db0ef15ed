"""PATNet: convolution on a quarter of the channels, partial attention on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_choice
from heedful.mixers.grid.patnet import (
    PartialChannelAttention,
    PartialSelfAttention,
    PartialSpatialAttention,
)
from heedful.models.backbone import Backbone, head
from heedful.models.parts import ConvNorm, DropPath, drop_path_rates
from heedful.registry import register

ACTS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}

# Each size without and with the spatial attention behind the MLPs.
CONFIGS = {
    "patnet_t0": {
        "parameters": 3_486_160,
        "arguments": {"dim": 32, "depths": (1, 2, 8, 2), "act": "gelu", "spatial": False},
    },
    "patnet_t0_sp": {
        "parameters": 3_558_240,
        "arguments": {"dim": 32, "depths": (1, 2, 8, 2), "act": "gelu", "spatial": True},
    },
    "patnet_t1": {
        "parameters": 5_985_552,
        "arguments": {"dim": 48, "depths": (1, 2, 8, 2), "act": "gelu", "spatial": False},
    },
    "patnet_t1_sp": {
        "parameters": 6_144_552,
        "arguments": {"dim": 48, "depths": (1, 2, 8, 2), "act": "gelu", "spatial": True},
    },
    "patnet_t2": {
        "parameters": 12_269_816,
        "arguments": {"dim": 64, "depths": (2, 2, 6, 4), "act": "relu", "spatial": False},
    },
    "patnet_t2_sp": {
        "parameters": 12_650_424,
        "arguments": {"dim": 64, "depths": (2, 2, 6, 4), "act": "relu", "spatial": True},
    },
    "patnet_s": {
        "parameters": 28_013_304,
        "arguments": {"dim": 96, "depths": (2, 2, 9, 4), "act": "relu", "spatial": False},
    },
    "patnet_s_sp": {
        "parameters": 28_975_704,
        "arguments": {"dim": 96, "depths": (2, 2, 9, 4), "act": "relu", "spatial": True},
    },
    "patnet_m": {
        "parameters": 59_179_000,
        "arguments": {"dim": 128, "depths": (2, 3, 16, 4), "act": "relu", "spatial": False},
    },
    "patnet_m_sp": {
        "parameters": 61_366_776,
        "arguments": {"dim": 128, "depths": (2, 3, 16, 4), "act": "relu", "spatial": True},
    },
    "patnet_l": {
        "parameters": 100_641_336,
        "arguments": {"dim": 160, "depths": (2, 3, 20, 4), "act": "relu", "spatial": False},
    },
    "patnet_l_sp": {
        "parameters": 104_465_336,
        "arguments": {"dim": 160, "depths": (2, 3, 20, 4), "act": "relu", "spatial": True},
    },
}


@register("patnet-backbone", kind="model", paper="patnet", tags=("image", "conv", "mobile"))
class PATNet(Backbone):
    """Image backbone for devices: gated channels in three stages, self-attention from the fourth on.

        stages 1 to 3:  x += mlp(channel attention(x))
        stage 4:        x += self-attention(x);   x += mlp(x)

    classes, in_channels, features_only  see `Backbone`
    dim        channels of the first stage; they double from stage to stage
    depths     blocks of each stage
    act        "gelu" or "relu"
    spatial    spatial attention at the end of every MLP
    mlp_ratio  hidden width of the MLPs over their dim
    heads      of the self-attention
    feature_dim  width of the vector that the head sees
    drop_path  rate of stochastic depth in the last block, growing from 0

    Raises ValueError on an unknown act, or channels that do not split. Source: PATNet, arXiv 2503.03148.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "dim": 8,
        "depths": (1, 1, 1, 1),
        "heads": 2,
        "feature_dim": 24,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        dim: int = 32,
        depths: Sequence[int] = (1, 2, 8, 2),
        act: str = "gelu",
        spatial: bool = True,
        mlp_ratio: float = 2.0,
        heads: int = 4,
        feature_dim: int = 1280,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_choice("act", act, [*ACTS])
        self.channels = tuple(dim * 2**stage for stage in range(len(depths)))
        self.reductions = tuple(4 * 2**stage for stage in range(len(depths)))
        self.feature_dim = feature_dim
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, width in enumerate(self.channels):
            before = self.channels[stage - 1] if stage else in_channels
            side = 2 if stage else 4
            blocks = [
                Block(
                    width,
                    attention=stage >= 3,
                    spatial=spatial,
                    mlp_ratio=mlp_ratio,
                    act=act,
                    heads=heads,
                    drop_path=rate,
                )
                for rate in rates[stage]
            ]
            self.stages.append(nn.Sequential(ConvNorm(before, width, side, stride=side, padding=0), *blocks))
        if not features_only:
            self.features_conv = nn.Conv2d(self.channels[-1], feature_dim, 1, bias=False)
            self.act = ACTS[act]()
            self.head = head(feature_dim, classes)
        self.apply(_init)

    @property
    def width(self) -> int:
        return self.feature_dim

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e"]:
        return self.act(self.features_conv(last.mean((2, 3), keepdim=True))).flatten(1)


class Block(nn.Module):
    """Partial convolution and attention, then an MLP of 1 x 1 convolutions."""

    def __init__(
        self,
        dim: int,
        *,
        attention: bool,
        spatial: bool,
        mlp_ratio: float,
        act: str,
        heads: int,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.mixer = PartialSelfAttention(dim, heads=heads) if attention else PartialChannelAttention(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            ConvNorm(dim, hidden),
            ACTS[act](),
            nn.Conv2d(hidden, dim, 1, bias=False),
            *([PartialSpatialAttention(dim)] if spatial else []),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        if self.attention:
            x = x + self.mixer(x)
            return x + self.drop_path(self.mlp(x))
        return x + self.drop_path(self.mlp(self.mixer(x)))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
