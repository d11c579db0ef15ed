"""The decoder of InfiniteVL: one layer of attention in a window, three of the gated delta rule, and again."""

from __future__ import annotations

from typing import Any

import torch

from heedful.checks import check_positive
from heedful.models.decoder_lm import DecoderLM
from heedful.registry import register


@register(
    "hybrid-decoder",
    kind="model",
    paper="infinitevl",
    tags=("language model", "linear", "delta rule", "window"),
    causal="always",
    decode=True,
)
def hybrid_decoder(
    vocabulary: int = 151936,
    dim: int = 2048,
    *,
    depth: int = 36,
    heads: int = 16,
    kv_heads: int = 2,
    head_dim: int = 128,
    window: int = 8192,
    linear_layers: int = 3,
    expand_v: float = 2.0,
    hidden: int = 11008,
    tied: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DecoderLM:
    """A `DecoderLM` whose state has a fixed size: sliding-window attention, then linear layers, repeated.

        layer i: attention over the last `window` tokens with rotary positions if i % (1 + linear_layers) = 0,
        else `gated-deltanet`, without positions

    vocabulary, dim, depth, hidden, tied   as in `DecoderLM`
    heads, head_dim   of both kinds of layers
    kv_heads          of attention
    window            keys that a query sees, its own counted
    linear_layers     after each layer of attention
    expand_v          width of a value of the linear layers, in head_dim

    The defaults are the published ones. Raises ValueError on sizes that do not fit.
    Source: InfiniteVL, arXiv 2512.08829.
    """
    check_positive("linear_layers", linear_layers)
    check_positive("depth", depth)
    local: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim, "sinks": 0, "window": window}
    linear: dict[str, Any] = {"head_dim": head_dim, "expand_v": expand_v}
    layers = [("streaming-llm", local), *[("gated-deltanet", linear)] * linear_layers]
    return DecoderLM(
        vocabulary,
        dim,
        depth=depth,
        mixers=layers[:depth],
        heads=heads,
        hidden=hidden,
        tied=tied,
        device=device,
        dtype=dtype,
    )
