"""TNL attention: the linear attention with decay of the lightning attention release, with a low-rank gate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.linear.lightning_attention_2 import LinearState
from heedful.mixers.mixer import Mixer
from heedful.ops.linear import decay_slopes, linear_attention
from heedful.registry import register


@register(
    "tnl-attention",
    kind="sequence",
    paper="lightning-attention",
    tags=("linear", "decay", "gate"),
    aliases=("lightning-attention",),
    causal="always",
    decode=True,
    complexity="O(N C^2)",
)
class TNLAttention(Mixer):
    """Causal linear attention with a decay, a layer norm over all heads and a gate of low rank.

        q, k, v = silu(x W_q), silu(x W_k), silu(x W_v);  heads of width d = dim / heads
        S_t = exp(-s) S_{t-1} + k_t^T v_t,  o_t = q_t S_t
        y = (LN(o) sigmoid(x G_1 G_2)) W_o,  G_1 (dim, d), G_2 (d, dim)

    s of a head is `decay_slopes(heads)` times 1 - layer_index / (layers - 1) + 1e-5. This is the module of
    the operator's repository; that of the released TransNormerLLM is `lightning-attention-2`.

    dim          channels
    heads        divides dim
    layer_index  number of this layer, from 0
    layers       layers of the model
    bias         in the four projections, not in the gate

    Padding: masked tokens add nothing to S (v = 0) but are steps of the decay. `positions` have no effect.
    State: S, of dim^2 / heads numbers whatever the length.
    Raises ValueError if heads does not divide dim, layer_index is not below layers, or a context is given.
    Source: Lightning Attention, arXiv 2405.17381.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "layer_index": 1, "layers": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        layer_index: int = 0,
        layers: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("layers", layers)
        if layer_index not in range(layers):
            raise ValueError(f"layer_index is {layer_index!r}, must be from 0 to {layers - 1} (layers - 1)")
        self.heads = heads
        depth = layer_index / max(layers - 1, 1)
        # Plain numbers, not a buffer: a model cast to bfloat16 must not round its decays.
        self.log_decay: list[float] = (-decay_slopes(heads) * (1 - depth + 1e-5)).tolist()

        def linear(width: int, out: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(width, out, bias=bias, device=device, dtype=dtype)

        self.query, self.key, self.value = (linear(dim, dim, bias) for _ in range(3))
        self.gate = nn.Sequential(linear(dim, dim // heads), linear(dim // heads, dim))
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.out = linear(dim, dim, bias)

    def init_state(self, batch: int) -> LinearState:
        """The state before the first token of `batch` sequences."""
        weight, width = self.out.weight, self.dim // self.heads
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return LinearState(0, weight.new_zeros(batch, self.heads, width, width, dtype=dtype))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: LinearState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], LinearState]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)

        q, k, v = (
            F.silu(project(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if mask is not None:
            v = v.masked_fill(~mask[:, None, :, None], 0)
        log_decay = x.new_tensor(self.log_decay, dtype=torch.promote_types(x.dtype, torch.float32))
        o, matrix = linear_attention(
            q, k, v, log_decay, state=None if state is None else state.matrix, return_state=True
        )
        y = self.out(self.norm(o.transpose(1, 2).flatten(2)) * self.gate(x).sigmoid())
        return y if state is None else (y, LinearState(state.length + x.shape[1], matrix))
