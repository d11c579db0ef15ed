"""Lightning Attention-2: gated linear attention with one fixed decay a head, as in TransNormerLLM."""

from __future__ import annotations

from dataclasses import dataclass
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
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.linear import decay_slopes, linear_attention
from heedful.registry import register


@dataclass(frozen=True)
class LinearState(State):
    """The matrix S of every head, sum of the decayed k^T v of the tokens seen; float32 or float64."""

    matrix: Float[Tensor, "b h d e"] | None = None


@register(
    "lightning-attention-2",
    kind="sequence",
    paper="lightning-attention-2",
    tags=("linear", "decay", "gate"),
    causal="always",
    decode=True,
    complexity="O(N C^2)",
)
class LightningAttention2(Mixer):
    """Causal linear attention with a decay and no normaliser, then a norm and a gate.

        q, k, v, u = x W;  q = silu(q), k = silu(k);  heads of width d = dim / heads
        S_t = exp(-s) S_{t-1} + k_t^T v_t,  o_t = q_t S_t
        y = (u * o / sqrt(mean(o^2) + eps)) W_o,  the mean over all heads together

    s of a head is `decay_slopes(heads)` times 1 - layer_index / (layers - 1) + 1e-5: memory grows with depth,
    and the last layer forgets almost nothing. No biases; 5 dim^2 parameters. This is the token mixer of the
    released models.

    dim          channels
    heads        heads, divides dim
    layer_index  number of this layer, from 0
    layers       layers of the model
    lrpe         whether queries and keys know their positions p (the released models: in layer 0 alone):
                 (q cos(theta p), q sin(theta p)) in place of q, and so for k, with learned theta, so that
                 q_t . k_j becomes sum_c q_tc k_jc cos(theta_c (t - j))
    eps          in the norm

    Padding: masked tokens add nothing to S (v = 0) but are steps of the decay. `positions` are for lrpe, and
    follow those of the state by default. State: S, of dim^2 / heads numbers (twice with lrpe) whatever the
    length.
    Raises ValueError if heads does not divide dim, layer_index is not below layers, or a context is given.
    Source: Lightning Attention-2, arXiv 2401.04658; the module, TransNormerLLM, arXiv 2307.14995.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "layer_index": 1, "layers": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        layer_index: int = 0,
        layers: int = 1,
        lrpe: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("layers", layers)
        if layer_index not in range(layers):
            raise ValueError(f"layer_index is {layer_index!r}, must be from 0 to {layers - 1} (layers - 1)")
        self.heads = heads
        self.eps = eps
        depth = layer_index / max(layers - 1, 1)
        # Plain numbers, not a buffer: a model cast to bfloat16 must not round its decays.
        self.log_decay: list[float] = (-decay_slopes(heads) * (1 - depth + 1e-5)).tolist()
        self.theta: nn.Parameter | None = None
        if lrpe:
            place = torch.arange(dim, device=device, dtype=torch.float64).view(heads, 1, -1)
            dtype_ = dtype or torch.get_default_dtype()
            self.theta = nn.Parameter((10000 ** (-2 * place / dim)).to(dtype_))
        self.qkvu_proj = nn.Linear(dim, 4 * dim, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def init_state(self, batch: int) -> LinearState:
        weight = self.out_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        width = self.dim // self.heads
        rows = width if self.theta is None else 2 * width
        return LinearState(0, weight.new_zeros(batch, self.heads, rows, width, dtype=dtype))

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

        q, k, v, u = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (F.silu(q), F.silu(k), v))
        if self.theta is not None:
            if positions is None:
                start = 0 if state is None else state.length
                positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = (self._placed(t, positions) for t in (q, k))
        if mask is not None:
            v = v.masked_fill(~mask[:, None, :, None], 0)
        log_decay = x.new_tensor(self.log_decay, dtype=torch.promote_types(x.dtype, torch.float32))
        o, matrix = linear_attention(
            q, k, v, log_decay, state=None if state is None else state.matrix, return_state=True
        )
        y = self.out_proj(u * srms_norm(o.transpose(1, 2).flatten(2), self.eps))
        return y if state is None else (y, LinearState(state.length + x.shape[1], matrix))

    def _placed(
        self, x: Float[Tensor, "b h n d"], positions: Shaped[Tensor, "*rows n"]
    ) -> Float[Tensor, "b h n two_d"]:
        """LRPE: twice the channels, turned by how far the token has come."""
        assert self.theta is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        angle = positions.to(wide)[..., None, :, None] * self.theta.to(wide)
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1).to(x.dtype)


def srms_norm(x: Float[Tensor, "*b c"], eps: float = 1e-6) -> Float[Tensor, "*b c"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 at least: no weights."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
