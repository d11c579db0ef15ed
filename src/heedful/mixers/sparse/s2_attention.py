"""S2-Attention: every head sees what is near and a shard of what is far, and all heads together see all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from heedful.checks import check_no_context
from heedful.mixers.heads.self_attention import SelfAttention, next_angles
from heedful.mixers.state import KVState, State
from heedful.ops.attention import attention
from heedful.ops.rotary import rotate
from heedful.patterns.local_stride import LocalStride, RelativeStride
from heedful.registry import register


@dataclass(frozen=True)
class ShardState(State):
    """Of each KV head, the keys and values that a later query may see, in the order of the tokens.

    Heads that hold fewer than others are filled up with zeros; mask (b, length) once one was given.
    """

    key: Float[Tensor, "b h kept d"] | None = None
    value: Float[Tensor, "b h kept d"] | None = None
    mask: Bool[Tensor, "b m"] | None = None


@register(
    "s2-attention",
    kind="sequence",
    paper="s2-attention",
    tags=("sparse", "softmax", "blocks", "heads"),
    causal="optional",
    decode=True,
    complexity="O(N (local_blocks block_size + N / stride) C)",
)
class S2Attention(SelfAttention):
    """Softmax attention over the last blocks and every stride-th block, on other blocks in every head.

        y = concat_h(softmax(q_h k_g^T / sqrt(d) over the keys that LocalStride shows head h) v_g) W_o

    The heads of a KV head share its shard; with `stride` KV heads or more the shards cover the context.

    block_size    tokens a block
    local_blocks  blocks of the window, the query's own counted
    stride        every stride-th block beyond; 1: dense attention
    dense_heads   so many KV heads, the last ones, see everything
    causal        False: windows to both sides and blocks counted from the query, the same in all heads
                  (`RelativeStride`); dense_heads must be 0
    The other arguments, and those of forward, are those of `SelfAttention`.

    A state keeps of each KV head its own shard and window alone (all keys if there are dense heads).
    Raises ValueError if heads do not divide, and for a context.
    Source: S2-Attention, arXiv 2407.17678; blocks and stride default to those of Phi-3-small.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "kv_heads": 2,
        "block_size": 3,
        "local_blocks": 2,
        "stride": 2,
        "rotary": True,
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        block_size: int = 64,
        local_blocks: int = 16,
        stride: int = 8,
        dense_heads: int = 0,
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
            causal=causal,
            rotary=rotary,
            qkv_bias=qkv_bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.shards = LocalStride(
            self.kv_heads,
            self.heads // self.kv_heads,
            block_size,
            local_blocks,
            stride,
            dense_heads=dense_heads,
        )
        if not causal and dense_heads:
            raise ValueError(
                f"dense_heads is {dense_heads}, must be 0 unless causal: all heads are alike then"
            )
        self.pattern = self.shards if causal else RelativeStride(block_size, local_blocks, stride)

    def init_state(self, batch: int) -> ShardState:  # type: ignore[override]
        """The state before the first token of `batch` sequences."""
        super().init_state(batch)
        return ShardState()

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: ShardState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], ShardState]:
        check_no_context(context, context_mask)
        if state is None:
            return super().forward(x, mask=mask, positions=positions)  # type: ignore[return-value]
        self._door(x, None, mask, None, positions, None)
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", d=self.head_dim)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        if self.rotary:
            angles = next_angles(x, self.head_dim, positions, KVState(state.length))
            query, key = (rotate(y, angles, pairing=self.pairing) for y in (query, key))
        joined = self._spread(state).append(key, value, mask)
        assert joined.key is not None and joined.value is not None
        dropout = self.dropout if self.training else 0.0
        heads = attention(
            query, joined.key, joined.value, pattern=self.shards, key_mask=joined.mask, dropout_p=dropout
        )
        return self.out(rearrange(heads, "b h n d -> b n (h d)")), self._gather(joined)

    def kept(self, length: int, device: torch.device) -> Int[Tensor, "h kept"]:
        """For each KV head the tokens, out of the first `length`, that later queries see; `length` pads."""
        size, local = self.shards.block_size, self.shards.local_blocks
        block = torch.arange(-(-length // size), device=device)
        head = torch.arange(self.kv_heads, device=device)[:, None] * self.shards.group
        wanted = (block > length // size - local) | self.shards.shard(head, block)
        count = wanted.sum(1, keepdim=True)
        most = int(count.max())
        chosen = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        chosen = chosen.masked_fill(torch.arange(most, device=device) >= count, len(block))
        return (chosen[..., None] * size + torch.arange(size, device=device)).flatten(1).clamp(max=length)

    def _spread(self, state: ShardState) -> KVState:
        """The state with zeros in the places of all tokens that were dropped, which no query sees."""
        if state.key is None or state.value is None:
            return KVState(state.length)
        index = self.kept(state.length, state.key.device)[None, :, :, None].expand_as(state.key)
        key, value = (
            x.new_zeros(*x.shape[:2], state.length + 1, x.shape[3]).scatter(2, index, x)[:, :, :-1]
            for x in (state.key, state.value)
        )
        return KVState(state.length, key, value, state.mask)

    def _gather(self, full: KVState) -> ShardState:
        assert full.key is not None and full.value is not None
        index = self.kept(full.length, full.key.device)[None, :, :, None]
        index = index.expand(full.key.shape[0], -1, -1, full.key.shape[3])
        key, value = (F.pad(x, (0, 0, 0, 1)).gather(2, index) for x in (full.key, full.value))
        return ShardState(full.length, key, value, full.mask)
