"""PowerAttention: sparse attention whose reach doubles with every layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from heedful.checks import check_no_context
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.state import KVState
from heedful.patterns.power import Power
from heedful.registry import register


@register(
    "power-attention",
    kind="sequence",
    paper="power-attention",
    tags=("sparse", "softmax", "blocks"),
    causal="always",
    decode=True,
    complexity="O(N log N C)",
)
class PowerAttention(SelfAttention):
    """Causal softmax attention over a sink, a window, and blocks at distances that are powers of two.

        y = concat_h(softmax(q_h k_g^T / sqrt(d) over the keys that Power shows) v_g) W_o

    Every head and layer has the same pattern, `heedful.patterns.Power`; the weights are those of plain
    attention. d layers reach 2^d - 1 blocks back. (Not the symmetric power attention of linear attention.)

    window, sinks  blocks of the window, the query's own counted, and blocks of the sink
    block_size     tokens a block
    The other arguments, and those of forward, are those of `SelfAttention`.

    Up to window * block_size tokens it is dense causal attention. A state keeps every key, because a block
    that is hidden now may be seen later. Raises ValueError if heads do not divide, and for a context.
    Source: PowerAttention, arXiv 2503.03588.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "kv_heads": 2,
        "window": 1,
        "block_size": 2,
        "rotary": True,
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 5,
        sinks: int = 1,
        block_size: int = 256,
        rotary: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=True,
            rotary=rotary,
            qkv_bias=qkv_bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.pattern = Power(window, sinks, block_size)  # which is causal itself

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: KVState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], KVState]:
        check_no_context(context, context_mask)
        return super().forward(x, mask=mask, positions=positions, state=state)
