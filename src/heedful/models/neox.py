"""The layers of GPT-NeoX: attention and feed-forward side by side, a share of the channels rotary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_positive
from heedful.mixers.state import KVState
from heedful.ops.attention import attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.patterns.causal import Causal

Made = dict[str, Any]  # device and dtype


class NeoXLayer(nn.Module):
    """x + attention(norm1(x)) + mlp(norm2(x)), causal, with a share of the channels turned by position.

    Queries, keys and values come from one projection, head after head.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        rotary_share: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        check_divides("heads", heads, "dim", dim)
        self.heads, self.turned = heads, int(dim // heads * rotary_share)
        if self.turned % 2:
            raise ValueError(f"rotary_share turns {self.turned} channels a head, must be an even number")
        self.norm1, self.norm2 = nn.LayerNorm(dim, **made), nn.LayerNorm(dim, **made)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, **made), nn.Linear(dim, dim, **made)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim, **made), nn.Linear(4 * dim, dim, **made)
        for layer in (self.qkv, self.out, self.wide, self.narrow):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, state: KVState
    ) -> tuple[Float[Tensor, "b n c"], KVState]:
        query, key, value = rearrange(self.qkv(self.norm1(x)), "b n (h s d) -> s b h n d", h=self.heads, s=3)
        if self.turned:
            place = torch.arange(state.length, state.length + x.shape[1], device=x.device)
            angles = rotary_angles(place, self.turned, dtype=x.dtype)
            query, key = rotate(query, angles), rotate(key, angles)
        state = state.append(key, value, mask)
        assert state.key is not None and state.value is not None
        heads = attention(query, state.key, state.value, pattern=Causal(), key_mask=state.mask)
        mixed = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return x + mixed + self.narrow(F.gelu(self.wide(self.norm2(x)))), state


class NeoX(nn.Module):
    """Layers and a last norm; x continues the sequences of the states (one a layer, empty at the start)."""

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        heads: int,
        rotary_share: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("depth", depth)
        made: Made = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            NeoXLayer(dim, heads=heads, rotary_share=rotary_share, **made) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, **made)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None = None,
        states: tuple[KVState, ...] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], tuple[KVState, ...]]:
        after = []
        for layer, state in zip(self.layers, states or [KVState()] * len(self.layers), strict=True):
            x, state = layer(x, mask, state)
            after.append(state)
        return self.norm(x), tuple(after)
