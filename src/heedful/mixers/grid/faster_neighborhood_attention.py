"""Neighborhood attention: every token of a line, image or video sees the window of tokens nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention, merge_partials
from heedful.patterns.neighborhood import Neighborhood
from heedful.patterns.separable import per_axis
from heedful.registry import register


@register(
    "faster-neighborhood-attention",
    kind="grid",
    paper="faster-neighborhood-attention",
    tags=("sparse", "local", "window"),
    aliases=("neighborhood-attention",),
    causal="optional",
    spatial=(1, 2, 3),
    complexity="O(N W C), W keys in a window",
    extra_inputs=("context",),
)
class NeighborhoodAttention(Mixer):
    """Softmax attention of every token over the window of tokens nearest to it.

        y_i = W sum_j softmax_j(d^-0.5 q_i . k_j) v_j,  j in the neighborhood of i

    with the neighborhood of `heedful.patterns.Neighborhood`: windows move inward at the borders and keep
    their size, a dilation takes every dilation-th token, a stride gives `stride` neighbouring queries one
    window, and a causal axis shows nothing of its future.

    dim       channels
    heads     divides dim
    window    keys on an axis; where window * dilation exceeds an axis of the map, the largest that fits
    stride    from 1 (sliding) to window (blocks)
    dilation  distance of neighbouring keys on an axis
    causal    whether an axis hides its future
    qkv_bias  whether the projection of queries, keys and values has a bias
    dropout   of the output
    window, stride, dilation and causal: one value, or one an axis, which fixes the number of axes.

    Raises ValueError if heads does not divide dim, stride exceeds window, or numbers of axes disagree.
    Sources: Faster Neighborhood Attention, arXiv 2403.04690; stride: GNA, arXiv 2504.16922.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "window": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int | Sequence[int] = 7,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        given = (window, stride, dilation, causal)
        axes = next((len(value) for value in given if isinstance(value, Sequence)), None)
        windows, strides, dilations, _ = (
            per_axis(name, value, axes or 1)
            for name, value in zip(("window", "stride", "dilation", "causal"), given, strict=True)
        )
        for w, s, d in zip(windows, strides, dilations, strict=True):
            check_positive("window", w)
            check_positive("stride", s)
            check_positive("dilation", d)
            if s > w:
                raise ValueError(f"stride is {s}, must be at most window, which is {w}")
        self.heads = heads
        self.window, self.stride, self.dilation, self.causal_axes = given
        self.causal = all(causal) if isinstance(causal, Sequence) else causal
        self.spatial = self.entry.spatial if axes is None else (axes,)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b c *space"], *, context: Float[Tensor, "b m c"] | None = None
    ) -> Float[Tensor, "b c *space"]:
        """Mix the map; every query also sees all tokens of `context`, in one softmax with its window.

        The context only adds keys and values: it is no map of its own and queries always come from x.
        """
        check_map("x", x, self.dim, self.spatial)
        size = tuple(x.shape[2:])
        q, k, v = self._heads(self.qkv(x.flatten(2).transpose(1, 2)))
        pattern = self.pattern(size)
        if context is None:
            y = attention(q, k, v, pattern=pattern)
        else:
            if context.ndim != 3 or (context.shape[0], context.shape[2]) != (x.shape[0], self.dim):
                raise ValueError(
                    f"context has shape {tuple(context.shape)}, must be ({x.shape[0]}, tokens, {self.dim})"
                )
            _, extra_k, extra_v = self._heads(self.qkv(context))
            near = attention(q, k, v, pattern=pattern, return_lse=True)
            y, _ = merge_partials([near, attention(q, extra_k, extra_v, return_lse=True)])
        y = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return y.transpose(1, 2).unflatten(2, size)

    def pattern(self, size: tuple[int, ...]) -> Neighborhood:
        """Who sees whom on a map of this size."""
        axes = len(size)
        # On an axis shorter than the dilation every token is the only one of its residue.
        dilation = tuple(map(min, per_axis("dilation", self.dilation, axes), size))
        largest = (length // d for length, d in zip(size, dilation, strict=True))
        window = tuple(map(min, per_axis("window", self.window, axes), largest))
        stride = tuple(map(min, per_axis("stride", self.stride, axes), window))
        return Neighborhood(size, window, stride, dilation, per_axis("causal", self.causal_axes, axes))

    def _heads(self, x: Float[Tensor, "b n _"]) -> tuple[Float[Tensor, "b h n d"], ...]:
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
