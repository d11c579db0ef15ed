"""Agent-DeiT: DeiT with agent attention, in all blocks or the first few."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from heedful.mixers.grid.agent_attention import AgentAttentionDeiT
from heedful.models.deit import DeiT, DenseAttention
from heedful.registry import register

CONFIGS = {
    "agent_deit_tiny": {"parameters": 6_015_640, "flops": "1.2G", "arguments": {}},
    "agent_deit_small": {"parameters": 22_647_112, "flops": "4.4G", "arguments": {"dim": 384, "heads": 6}},
    "agent_deit_base": {
        "parameters": 87_204_904,
        "flops": "17.6G",
        "arguments": {"dim": 768, "heads": 12, "agents": 81, "agent_layers": 4},
    },
}


@register("agent-deit-backbone", kind="model", paper="agent-attention", tags=("image", "linear", "landmarks"))
class AgentDeiT(DeiT):
    """Vision transformer of patches: agent attention in the first blocks, softmax attention in the others.

    classes, in_channels, features_only  see `Backbone`
    dim, depth, image_size, patch, mlp_ratio, drop_path  see `DeiT`
    heads         of each block
    agents        of each head, a square
    agent_layers  blocks with agent attention; None: all

    Source: Agent Attention, arXiv 2312.08874.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "dim": 12,
        "depth": 3,
        "heads": 3,
        "agents": 4,
        "agent_layers": 2,
        "image_size": 48,
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
        agents: int = 49,
        agent_layers: int | None = None,
        image_size: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        side = image_size // patch

        def mixer(layer: int) -> nn.Module:
            if agent_layers is None or layer < agent_layers:
                return AgentAttentionDeiT(dim, heads=heads, agents=agents, size=(side, side))
            return DenseAttention(dim, heads=heads)

        super().__init__(
            mixer,
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            dim=dim,
            depth=depth,
            image_size=image_size,
            patch=patch,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )
