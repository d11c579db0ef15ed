"""Mixture-of-head attention on maps: the two attentions of TransNeXt, with shared and routed heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.mixers.grid.transnext import AggregatedAttention, CosineHeads, GlobalCosineAttention
from heedful.registry import register
from heedful.routing.head_gate import HeadGate, default_shares


class _GatedHeads(CosineHeads):
    """What both add to TransNeXt's: a gate that weighs and chooses the heads of each place."""

    def add_gate(
        self,
        *,
        shared_heads: int | None,
        routed_heads: int | None,
        load_balance: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.load_balance = load_balance
        shared, routed = default_shares(self.heads, shared_heads, routed_heads)
        self.gate = HeadGate(
            self.dim, heads=self.heads, shared=shared, routed=routed, device=device, dtype=dtype
        )
        for module in self.gate.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def weigh(
        self, tokens: Float[Tensor, "b n c"], heads: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n d"]:
        gates, loss = self.gate(tokens)
        self.aux_losses = (
            {"load_balance": self.load_balance * loss} if self.training and loss is not None else {}
        )
        return heads * rearrange(gates, "b n h -> b h n 1").to(heads.dtype)


@register(
    "moh-vit",
    kind="grid",
    paper="moh",
    tags=("heads", "softmax", "cosine", "gate", "router"),
    spatial=(2,),
    complexity="O(N^2 C)",
)
class MixtureOfHeadVisionAttention(_GatedHeads, GlobalCosineAttention):
    """Cosine attention over a whole map, whose heads are weighed and chosen by each place.

        y = concat_h(g_h(x) softmax(s_h) v_h) W_o,   s: see `GlobalCosineAttention`, g: see `HeadGate`

    The last stage of MoH-ViT.

    dim           channels
    heads         all heads; the first `shared_heads` of them are always on
    shared_heads  None: half of the heads
    routed_heads  how many of the others are on for a place; None: half of them
    load_balance  weight of the auxiliary loss; the published 0.01 is for the mean over layers
    trained_size, qkv_bias  see `GlobalCosineAttention`

    In training aux_losses["load_balance"] tells, weighed, how unevenly the routed heads are used.
    Raises ValueError if heads do not divide or their numbers do not fit.
    Source: MoH, arXiv 2410.11842; TransNeXt, arXiv 2311.17132.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12, "heads": 4, "shared_heads": 1, "routed_heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        load_balance: float = 0.01,
        trained_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        GlobalCosineAttention.__init__(
            self, dim, heads=heads, trained_size=trained_size, qkv_bias=qkv_bias, device=device, dtype=dtype
        )
        self.add_gate(
            shared_heads=shared_heads,
            routed_heads=routed_heads,
            load_balance=load_balance,
            device=device,
            dtype=dtype,
        )


@register(
    "moh-vit-aggregated",
    kind="grid",
    paper="moh",
    tags=("heads", "softmax", "cosine", "gate", "router", "local", "pooled"),
    spatial=(2,),
    complexity="O(N (w^2 + N / r^2) C)",
)
class MixtureOfHeadAggregatedAttention(_GatedHeads, AggregatedAttention):
    """Cosine attention of each place over its neighbours and a pooled map, with heads weighed and chosen.

        y = concat_h(g_h(x) o_h) W_o,   o: see `AggregatedAttention`, g: see `HeadGate`

    The first stages of MoH-ViT.

    dim           channels
    heads         all heads; the first `shared_heads` of them are always on
    shared_heads  None: half of the heads
    routed_heads  how many of the others are on for a place; None: half of them
    load_balance  weight of the auxiliary loss; the published 0.01 is for the mean over layers
    window, pool_ratio, trained_size, qkv_bias  see `AggregatedAttention`

    In training aux_losses["load_balance"] tells, weighed, how unevenly the routed heads are used.
    Raises ValueError if heads do not divide or their numbers do not fit.
    Source: MoH, arXiv 2410.11842; TransNeXt, arXiv 2311.17132.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 18, "heads": 6, "shared_heads": 2, "routed_heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        window: int = 3,
        pool_ratio: int = 2,
        load_balance: float = 0.01,
        trained_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        AggregatedAttention.__init__(
            self,
            dim,
            heads=heads,
            window=window,
            pool_ratio=pool_ratio,
            trained_size=trained_size,
            qkv_bias=qkv_bias,
            device=device,
            dtype=dtype,
        )
        self.add_gate(
            shared_heads=shared_heads,
            routed_heads=routed_heads,
            load_balance=load_balance,
            device=device,
            dtype=dtype,
        )
