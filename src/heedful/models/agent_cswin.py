"""Agent-CSwin: CSwin with agent attention of the whole map in its first stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from heedful.checks import check_stages
from heedful.mixers.grid.agent_attention import AgentCore
from heedful.models.cswin import CSwin, Stripes, crossing
from heedful.registry import register

# Published as 21, 33 and 73 M; the exact counts are those of the authors' layers, added up.
CONFIGS = {
    "agent_cswin_tiny": {"parameters": 20_458_672, "flops": "4.3G", "arguments": {}},
    "agent_cswin_small": {
        "parameters": 32_814_100,
        "flops": "6.8G",
        "arguments": {"depths": (3, 6, 29, 2), "agent_layers": (3, 6, 0, 0)},
    },
    "agent_cswin_base": {
        "parameters": 73_249_696,
        "flops": "14.9G",
        "arguments": {
            "depths": (3, 6, 29, 2),
            "dims": (96, 192, 384, 768),
            "heads": (4, 8, 16, 32),
            "agent_layers": (3, 6, 0, 0),
        },
    },
}


@register(
    "agent-cswin-backbone", kind="model", paper="agent-attention", tags=("image", "linear", "landmarks")
)
class AgentCSwin(CSwin):
    """Image backbone of four stages: agent attention in the first blocks, crossing stripes in the others.

    classes, in_channels, features_only  see `Backbone`
    depths, dims, image_size, mlp_ratio, drop_path  see `CSwin`
    heads         of each stage, even where there are stripes
    agents        of each head in each stage, squares
    agent_layers  blocks of each stage with agent attention of the whole map, which come first
    stripes       width of the stripes of the others; the last stage has none, nor have maps that are one

    Source: Agent Attention, arXiv 2312.08874.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 2, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (2, 2, 2, 2),
        "agents": (4, 4, 4, 4),
        "agent_layers": (1, 1, 0, 0),
        "stripes": (1, 2, 3, 3),
        "image_size": 64,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 4, 18, 1),
        dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (2, 4, 8, 16),
        agents: Sequence[int] = (9, 16, 49, 49),
        agent_layers: Sequence[int] = (2, 4, 0, 0),
        stripes: Sequence[int] = (1, 2, 7, 7),
        image_size: int = 224,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        def attend(stage: int, layer: int, side: int) -> nn.Module:
            dim, own = dims[stage], heads[stage]
            if layer < agent_layers[stage]:
                return Stripes(AgentCore(dim, heads=own, agents=agents[stage], size=(side, side)))
            # The last stage has no stripes.
            stripe = stripes[stage] if stage < 3 else side
            return crossing(dim, heads=own, stripe=stripe, side=side)

        check_stages(4, heads=heads, agents=agents, agent_layers=agent_layers, stripes=stripes)
        super().__init__(
            attend,
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            depths=depths,
            dims=dims,
            image_size=image_size,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )
