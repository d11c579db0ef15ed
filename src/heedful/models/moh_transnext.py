"""MoH-ViT: TransNeXt in which each place chooses among the heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from heedful.checks import check_stages
from heedful.mixers.heads.moh_vit import MixtureOfHeadAggregatedAttention, MixtureOfHeadVisionAttention
from heedful.models.transnext import TransNeXt
from heedful.registry import register

CONFIGS = {
    "moh_transnext_small_75": {"parameters": 49_910_548, "arguments": {}},
    "moh_transnext_small_80": {"parameters": 49_910_548, "arguments": {"shared_heads": (3, 6, 3, 8)}},
    "moh_transnext_base_75": {
        "parameters": 90_020_632,
        "arguments": {
            "depths": (5, 5, 23, 5),
            "dims": (96, 192, 384, 768),
            "heads": (4, 8, 16, 32),
            "shared_heads": (4, 8, 4, 5),
            "routed_heads": (0, 0, 8, 16),
        },
    },
    "moh_transnext_base_50": {
        "parameters": 90_023_512,
        "arguments": {
            "depths": (5, 5, 23, 5),
            "dims": (96, 192, 384, 768),
            "heads": (4, 8, 16, 32),
            "shared_heads": (2, 2, 2, 4),
            "routed_heads": (2, 4, 6, 8),
        },
    },
}


@register("moh-transnext-backbone", kind="model", paper="moh", tags=("image", "heads", "router"))
class MoHTransNeXt(TransNeXt):
    """TransNeXt whose attentions have shared heads, and others that each place chooses from.

    classes, in_channels, features_only  see `Backbone`
    depths, dims, heads, pool_ratios, window, mlp_ratios, trained_size, drop_path  see `TransNeXt`
    shared_heads  heads of each stage that are always on
    routed_heads  how many of the others are on for a place, in each stage

    In training the mixers' aux_losses["load_balance"] are weighed so that their sum is 0.01 of the mean over
    the layers with routed heads. Source: MoH, arXiv 2410.11842.
    """

    example: ClassVar[dict[str, Any]] = {
        **TransNeXt.example,
        "heads": (2, 4, 4, 4),
        "shared_heads": (2, 2, 1, 2),
        "routed_heads": (0, 2, 2, 2),
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (5, 5, 22, 5),
        dims: Sequence[int] = (72, 144, 288, 576),
        heads: Sequence[int] = (3, 6, 12, 24),
        shared_heads: Sequence[int] = (3, 6, 3, 4),
        routed_heads: Sequence[int] = (0, 0, 6, 12),
        pool_ratios: Sequence[int] = (8, 4, 2, 1),
        window: int = 3,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        trained_size: int | None = 224,
        drop_path: float = 0.0,
    ) -> None:
        check_stages(len(dims), depths=depths, shared_heads=shared_heads, routed_heads=routed_heads)
        layers = sum(depth for depth, routed in zip(depths, routed_heads, strict=True) if routed)
        self._gates: list[dict[str, Any]] = [
            {"shared_heads": shared, "routed_heads": routed, "load_balance": 0.01 / max(1, layers)}
            for shared, routed in zip(shared_heads, routed_heads, strict=True)
        ]
        super().__init__(
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            depths=depths,
            dims=dims,
            heads=heads,
            pool_ratios=pool_ratios,
            window=window,
            mlp_ratios=mlp_ratios,
            trained_size=trained_size,
            drop_path=drop_path,
        )

    def local_mixer(self, stage: int, dim: int, **how: Any) -> nn.Module:
        return MixtureOfHeadAggregatedAttention(dim, **how, **self._gates[stage])

    def global_mixer(self, stage: int, dim: int, **how: Any) -> nn.Module:
        return MixtureOfHeadVisionAttention(dim, **how, **self._gates[stage])
