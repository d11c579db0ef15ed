"""Flux attention: a layer decides once whether it attends to everything or to sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from heedful.checks import (
    check_choice,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.packed import PackedState, Packing
from heedful.ops.attention import attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.patterns.causal import Causal
from heedful.patterns.pattern import Pattern
from heedful.registry import register
from heedful.routing.layer_router import LayerRouter, end_weights, streaming_blocks

SELECTIONS = ("strict", "paper")


@dataclass(frozen=True)
class FluxState(PackedState):
    """Keys, values, and what the decision rests on (b, d): the mean of queries that are pooled, so far."""

    pooled: Float[Tensor, "b d"] | None = None


@register(
    "flux-attention",
    kind="sequence",
    paper="flux-attention",
    tags=("sparse", "softmax", "layer", "router"),
    causal="always",
    decode=True,
    complexity="O(N W C) in a sparse layer that sees W tokens, O(N^2 C) in a full one",
)
class FluxAttention(SelfAttention):
    """Causal attention that a router makes full or sparse, for the whole layer and sequence.

        z = router(mean over heads of the first and the last `pool` queries)    0 or 1
        y = W_o (z Attention(q, k, v) + (1 - z) Attention(q, k, v; sink and local blocks))

    The sparse branch sees `sink_blocks` blocks at the start, the own block and those before it up to
    `local_blocks`. Up to (sink_blocks + local_blocks) block_size tokens both branches are the same; the
    strict form decides there, from the first tokens and the last up to that place, and keeps to it. In
    training both branches are computed and z is drawn with gradients to the router; else only the branch of
    the decision.

    dim           channels
    heads         query heads;  kv_heads: key and value heads, a divisor; None: as many
    head_dim      channels a head; None: dim / heads
    block_size, sink_blocks, local_blocks   the sparse branch
    pool          queries pooled at each end
    selection     "strict"; or "paper": the decision pools the ends of the whole prompt, the first call with
                  a state, so that tokens of the prompt see later ones through it: not causal
    rotary        rotary position embedding on queries and keys; the router sees queries without it
    qkv_bias      biases in the projections of queries, keys and values
    dropout       share of the attention weights dropped in training

    `FluxAttention.around(layer)` puts a router on a trained `SelfAttention` and freezes the rest; at the
    start every layer is full and gives what it gave. In training aux_losses["full_share"] is the mean of z;
    `SparsityTarget` makes a loss of those of all layers. Sinks and blocks count real tokens: masked ones are
    left out.
    Raises ValueError as `SelfAttention` does, and for a context.
    Source: Flux Attention, arXiv 2604.07394.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "kv_heads": 2,
        "block_size": 2,
        "local_blocks": 1,
        "pool": 3,
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        block_size: int = 128,
        sink_blocks: int = 1,
        local_blocks: int = 16,
        pool: int = 100,
        selection: str = "strict",
        rotary: bool = True,
        qkv_bias: bool = False,
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
        check_choice("selection", selection, SELECTIONS)
        check_positive("sink_blocks", sink_blocks)
        check_positive("pool", pool)
        self.sparse = streaming_blocks(block_size, sink_blocks, local_blocks)
        self.same = (sink_blocks + local_blocks) * block_size  # tokens up to which the branches do not differ
        self.pool, self.selection = pool, selection
        self.causal = selection == "strict"
        self.router = LayerRouter(self.head_dim, device=device, dtype=dtype)

    @classmethod
    def around(cls, layer: SelfAttention, **options: Any) -> Self:
        """A trained causal layer with a router; its own weights are kept, shared and frozen.

        options: block_size, sink_blocks, local_blocks, pool, selection.
        Raises ValueError unless the layer is
        causal and sees everything before.
        """
        if layer.pattern != Causal():
            raise ValueError(f"layer sees {layer.pattern}, must see Causal()")
        weight = layer.query.weight
        made = cls(
            layer.dim,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            rotary=layer.rotary,
            qkv_bias=layer.query.bias is not None,
            dropout=layer.dropout,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        for name, part in layer.named_children():
            setattr(made, name, part.requires_grad_(False))
        return made.train(layer.training)

    def init_state(self, batch: int) -> FluxState:  # type: ignore[override]
        """The state before the first token; it keeps all keys and values, and the decision."""
        return FluxState()

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: FluxState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], FluxState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        past = FluxState() if state is None else state
        if positions is None:
            positions = torch.arange(past.length, past.length + x.shape[1], device=x.device)
        query, key, value = (
            rearrange(layer(x), "b n (h d) -> b h n d", d=self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        held = 0 if past.key is None else past.key.shape[2]
        packing = Packing.of(x[..., 0], mask, past.length, past.count, held)
        # 1. Pool queries, before the rotary embedding.
        pooled = self._pool(packing.put(query), packing, past)
        if self.rotary:
            angles = rotary_angles(positions, self.head_dim, dtype=x.dtype)
            query, key = (
                rotate(query, angles, pairing=self.pairing),
                rotate(key, angles, pairing=self.pairing),
            )
        query = packing.put(query)
        key, value = (
            packing.extend(past.key, packing.put(key)),
            packing.extend(past.value, packing.put(value)),
        )
        # 2 to 5. Before `same` tokens the branches are one; from there on the router decides.
        split = min(max(self.same, packing.start), packing.stop)
        early = self._attend(query[:, :, : split - packing.start], key, value, Causal(), packing.start)
        late = query[:, :, split - packing.start :]
        self.aux_losses = {}
        if late.shape[2]:
            z = self.router.decide(pooled)
            if self.training:
                self.aux_losses["full_share"] = z.mean()
            early = torch.cat([early, self._late(late, key, value, z, split)], dim=2)
        y = self.out(rearrange(packing.take(early), "b h n d -> b n (h d)"))
        if state is None:
            return y
        return y, FluxState(
            past.length + x.shape[1], key, value, packing.count, pooled if packing.stop else None
        )

    def _pool(
        self, query: Float[Tensor, "b h n d"], packing: Packing, past: FluxState
    ) -> Float[Tensor, "b d"]:
        place = torch.arange(packing.start, packing.stop, device=query.device)
        if self.selection == "paper":
            if past.pooled is not None:
                return past.pooled  # decided with the prompt
            real = None if packing.count is None else place < packing.count[:, None]
            weight = end_weights(query, self.pool, real)
        else:
            # The ends of the first `same` tokens; what of them was there before is in the state.
            ends = (place < self.pool).to(query.dtype) + (place >= self.same - self.pool).to(query.dtype)
            weight = (ends * (place < self.same) / (2 * min(self.pool, self.same)))[None]
        # Places without a token hold zeros.
        pooled = torch.einsum("bhnd,bn->bd", query, weight.expand(query.shape[0], -1)) / self.heads
        return pooled if past.pooled is None else past.pooled + pooled

    def _late(
        self, query: Float[Tensor, "b h n d"], key: Tensor, value: Tensor, z: Float[Tensor, " b"], offset: int
    ) -> Float[Tensor, "b h n d"]:
        if self.training or torch.compiler.is_compiling():
            z = z[:, None, None, None]
            full = self._attend(query, key, value, Causal(), offset)
            return z * full + (1 - z) * self._attend(query, key, value, self.sparse, offset)
        out = torch.empty_like(query)
        for decision, pattern in ((0, self.sparse), (1, Causal())):
            rows = (z == decision).nonzero()[:, 0]
            if len(rows) == len(z):
                return self._attend(query, key, value, pattern, offset)
            out[rows] = self._attend(query[rows], key[rows], value[rows], pattern, offset)
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, offset: int) -> Tensor:
        stop = offset + query.shape[2]
        dropout = self.dropout if self.training else 0.0
        return attention(
            query,
            key[:, :, :stop],
            value[:, :, :stop],
            pattern=pattern,
            query_offset=offset,
            dropout_p=dropout,
        )
