"""Frozen LM block: a block of a language model as a layer of a visual encoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
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
from heedful.mixers.heads.swiglu import SwiGLU
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import State
from heedful.ops.attention import attention
from heedful.registry import register


class LMBlock(nn.Module):
    """A block of a language model of the Llama kind, without positions and without a causal mask.

        x += W_o softmax(q k^T / sqrt(d)) v,   q, k, v from RMSNorm(x);    x += SwiGLU(RMSNorm(x))

    dim       channels;  hidden: inner width of the SwiGLU
    heads     query heads, a divisor of dim;  kv_heads: a divisor of those
    eps       of the norms
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        hidden: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides("heads", heads, "lm_dim", dim)
        check_divides("kv_heads", kv_heads, "heads", heads)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim = dim // heads
        self.norm1 = nn.RMSNorm(dim, eps=eps, **made)
        self.query = nn.Linear(dim, dim, bias=False, **made)
        self.key = nn.Linear(dim, kv_heads * self.head_dim, bias=False, **made)
        self.value = nn.Linear(dim, kv_heads * self.head_dim, bias=False, **made)
        self.out = nn.Linear(dim, dim, bias=False, **made)
        self.norm2 = nn.RMSNorm(dim, eps=eps, **made)
        self.mlp = SwiGLU(dim, hidden=hidden, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        seen = self.norm1(x)
        query, key, value = (
            rearrange(linear(seen), "b n (h d) -> b h n d", d=self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        heads = attention(query, key, value, key_mask=mask)
        x = x + self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


@register(
    "frozen-lm-block",
    kind="sequence",
    paper="frozen-lm-block",
    tags=("pretrained", "softmax"),
    complexity="O(N^2 lm_dim + N lm_dim hidden)",
)
class FrozenLMBlock(Mixer):
    """Tokens through a block of a language model that does not learn, between two linear maps that do.

        y = W_2 RMSNorm(block(W_1 x))                                there is no residual around it

    The block sees all tokens and no positions (`LMBlock`). It stands behind the last block of an encoder and
    before its final norm. `heedful.convert.frozen_lm_block` takes the block out of a pretrained model.

    dim       channels of x and y
    lm_dim    channels of the language model
    heads     of the language model, a divisor of lm_dim
    kv_heads  its key and value heads; None: as many
    hidden    inner width of its SwiGLU
    layers    blocks, one after the other
    frozen    its parameters do not learn; gradients pass through
    eps       of its norms

    forward: mask (b, n) hides tokens of x as keys; positions have no effect.
    Raises ValueError if heads do not divide, on wrong shapes, and if a context or a state is given.
    Source: Frozen Transformers in Language Models Are Effective Visual Encoder Layers, arXiv 2310.12973.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "lm_dim": 24, "heads": 4, "hidden": 20}

    def __init__(
        self,
        dim: int,
        *,
        lm_dim: int = 4096,
        heads: int = 32,
        kv_heads: int | None = None,
        hidden: int = 11008,
        layers: int = 1,
        frozen: bool = True,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("lm_dim", lm_dim)
        check_positive("layers", layers)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads or heads, "hidden": hidden}
        self.enter = nn.Linear(dim, lm_dim, bias=False, **made)
        self.blocks = nn.ModuleList(LMBlock(lm_dim, **sizes, eps=eps, **made) for _ in range(layers))
        self.norm = nn.RMSNorm(lm_dim, eps=eps, **made)
        self.leave = nn.Linear(lm_dim, dim, bias=False, **made)
        if frozen:
            self.blocks.requires_grad_(False)
            self.norm.requires_grad_(False)

    def language(
        self, x: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n e"]:
        """What the language model makes of tokens of its own width."""
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None:
            raise ValueError("state is given, must be None: later tokens would change earlier ones")
        return self.leave(self.language(self.enter(x), mask))
