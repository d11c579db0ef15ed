"""Agent-PVT: the pyramid of PVT with agent attention in every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from heedful.checks import check_stages
from heedful.mixers.grid.agent_attention import AgentAttentionPVT
from heedful.models.pvt import PVT
from heedful.registry import register

CONFIGS = {
    "agent_pvt_tiny": {"parameters": 11_570_352, "flops": "2.0G", "arguments": {}},
    "agent_pvt_small": {"parameters": 20_635_066, "flops": "4.0G", "arguments": {"depths": (3, 4, 6, 3)}},
    "agent_pvt_medium": {"parameters": 35_921_746, "flops": "7.0G", "arguments": {"depths": (3, 4, 18, 3)}},
    "agent_pvt_large": {"parameters": 48_738_180, "flops": "10.4G", "arguments": {"depths": (3, 8, 27, 3)}},
}


@register("agent-pvt-backbone", kind="model", paper="agent-attention", tags=("image", "linear", "landmarks"))
class AgentPVT(PVT):
    """Image backbone of four stages with agent attention, whose keys and values are not reduced.

    classes, in_channels, features_only  see `Backbone`
    depths, dims, mlp_ratios, image_size, drop_path  see `PVT`
    heads   of each stage
    agents  of each head in each stage, squares

    Source: Agent Attention, arXiv 2312.08874.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (1, 1, 2, 2),
        "mlp_ratios": (2, 2, 2, 2),
        "agents": (4, 4, 4, 4),
        "image_size": 64,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 2, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agents: Sequence[int] = (9, 16, 49, 49),
        image_size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        check_stages(4, heads=heads, agents=agents)
        super().__init__(
            lambda stage, side: AgentAttentionPVT(
                dims[stage], heads=heads[stage], agents=agents[stage], size=(side, side)
            ),
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            depths=depths,
            dims=dims,
            mlp_ratios=mlp_ratios,
            image_size=image_size,
            drop_path=drop_path,
        )
