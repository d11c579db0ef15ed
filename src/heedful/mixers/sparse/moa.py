"""MoA: a span of its own for every head, which grows with the length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from heedful.checks import check_no_context
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.state import KVState
from heedful.patterns.elastic_span import ElasticSpan
from heedful.registry import register


@register(
    "moa",
    kind="sequence",
    paper="moa",
    tags=("sparse", "softmax", "window", "heads"),
    aliases=("mixture-of-attention-spans",),
    causal="always",
    decode=True,
    complexity="O(N span C)",
)
class MixtureOfSpans(SelfAttention):
    """Causal softmax attention over the first tokens and, in each head, a span of alpha + beta N tokens.

        y = concat_h(softmax(q_h k_g^T / sqrt(d) over the keys that ElasticSpan shows) v_g) W_o

    The weights are those of plain attention; `heedful.inspect.search_spans` finds alpha and beta for the
    layers and heads of a given model, and a `SpanPlan` holds them.

    alpha, beta  one number for all heads, or one a KV head; alpha in tokens, beta between 0 and 1
    sink         first tokens that all see, a multiple of block_size
    block_size   tokens a block; spans are whole blocks
    length       N. None: for every query the tokens up to the end of its own block, so that decoding
                 equals the full pass; a number: the authors' use, where all queries of a prompt have the
                 span of the prompt's length
    The other arguments, and those of forward, are those of `SelfAttention`.

    A state keeps every key. Raises ValueError if heads do not divide, if alpha and beta are not for the KV
    heads, and for a context. Source: MoA, arXiv 2406.14909.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "kv_heads": 2,
        "alpha": (4, -4),
        "beta": (0.0, 0.5),
        "sink": 2,
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
        alpha: float | int | Sequence[float | int] = 0.0,
        beta: float | int | Sequence[float | int] = 0.5,
        sink: int = 64,
        block_size: int = 64,
        length: int | None = None,
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
        rules = [self._per_head(name, given) for name, given in (("alpha", alpha), ("beta", beta))]
        self.pattern = ElasticSpan(rules[0], rules[1], sink, block_size, length)  # which is causal itself

    def _per_head(self, name: str, given: float | int | Sequence[float | int]) -> Sequence[float | int]:
        """From one number, or one a KV head, to one for all or one a query head."""
        if not isinstance(given, Sequence):
            return (given,)
        if len(given) != self.kv_heads:
            raise ValueError(f"{name} has {len(given)} numbers, must have one a KV head, {self.kv_heads}")
        return tuple(x for x in given for _ in range(self.heads // self.kv_heads))

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
