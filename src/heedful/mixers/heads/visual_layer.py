"""What decoder layers share whose tokens are text or visual."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from heedful.checks import (
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState


class VisualLayer(Mixer):
    """Sizes, norms, state and checks of a causal pre-norm layer that is told which tokens are visual."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int | None,
        hidden: int | None,
        norm_eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim)
        kv_heads = heads if kv_heads is None else kv_heads
        check_divides("heads", heads, "dim", dim)
        check_divides("kv_heads", kv_heads, "heads", heads)
        self.hidden = 4 * dim if hidden is None else hidden
        check_positive("hidden", self.hidden)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        if self.head_dim % 2:
            raise ValueError(f"heads is {heads}, must leave an even number of channels a head, of {dim}")
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps, device=device, dtype=dtype)

    def init_state(self, batch: int) -> KVState:
        """The state before the first token of `batch` sequences."""
        return KVState()

    def example_inputs(self, **how: Any) -> dict[str, Tensor]:
        """As of every sequence mixer, and which tokens are visual: a random half."""
        inputs = super().example_inputs(**how)
        generator = torch.Generator().manual_seed(how.get("seed", 0))
        inputs["visual"] = torch.rand(inputs["x"].shape[:2], generator=generator) < 0.5
        return inputs

    def door(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Bool[Tensor, "b n"] | None,
        context_mask: Tensor | None,
        positions: Tensor | None,
        visual: Bool[Tensor, "b n"] | None,
    ) -> None:
        """Check the arguments of a forward."""
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_mask("visual", visual, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
