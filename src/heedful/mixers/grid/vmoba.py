"""VMoBA: video tokens see their own chunk and the chunks whose mean key they like best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_choice, check_positive
from heedful.mixers.grid.map_attention import MapAttention
from heedful.ops.attention import attention
from heedful.registry import register
from heedful.routing.block_topk import grid_blocks
from heedful.routing.chunk_gate import moba_chunks

Chunk = int | float | tuple[int, int] | tuple[int, int, int]


@register(
    "vmoba",
    kind="grid",
    paper="vmoba",
    tags=("sparse", "routing", "video"),
    spatial=(3,),
    complexity="O(N K C + N G C), K tokens seen, G chunks",
    exempt={"exporting": "the data decide how many queries see a chunk, and with it the sizes of groups"},
)
class VideoMixtureOfBlockAttention(MapAttention):
    """Softmax attention of each query over its own chunk and those that `moba_chunks` picks for it.

        y_i = W sum_j softmax_j(d^-0.5 q_i . k_j) v_j,  j in a chunk seen by i

    The shape of chunks goes round from layer to layer: slabs of time, columns of space, cubes. Selection
    passes no gradient.

    dim        channels
    heads      divides dim
    layer      number of the layer: its chunks are chunks[layer mod len(chunks)]
    chunks     for each kind of layer: frames (a number, also a broken one: that many frames' tokens in a
               row), (height, width) of a column through all frames, or (frames, height, width) of a cube, in
               tokens; those at the borders may be cut short
    select     "threshold" or "topk"
    scope      what shares a threshold or budget: "head_global" (the paper's), "query_head" (the default of
               the authors' code), "block" or "overall"
    threshold  share of the similarity that is covered
    topk       chunks seen by a query, its own included
    qkv_bias   whether the projection of queries, keys and values has a bias

    Raises ValueError if heads does not divide dim, and on unknown choices or sizes that are not positive.
    Source: VMoBA, arXiv 2506.23858.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "layer": 2, "chunks": (1, (2, 2), (2, 2, 2))}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        layer: int = 0,
        chunks: Sequence[Chunk] = (1, (8, 8), (4, 8, 8)),
        select: str = "threshold",
        scope: str = "head_global",
        threshold: float = 0.25,
        topk: int = 3,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, qkv_bias=qkv_bias, device=device, dtype=dtype)
        if not chunks:
            raise ValueError("chunks is empty, must hold at least one kind of chunk")
        for chunk in chunks:
            sides = chunk if isinstance(chunk, tuple) else (chunk,)
            if len(sides) > 3 or min(sides) <= 0:
                raise ValueError(
                    f"chunks holds {chunk}, must hold frames, (height, width) or (frames, height, width)"
                )
        check_choice("select", select, ("threshold", "topk"))
        scopes = ("query_head", "head_global", "overall", "block")
        check_choice("scope", scope, scopes if select == "threshold" else scopes[:3])
        if threshold <= 0:
            raise ValueError(f"threshold is {threshold}, must be positive")
        check_positive("topk", topk)
        self.chunk = chunks[layer % len(chunks)]
        self.select, self.scope, self.threshold, self.topk = select, scope, threshold, topk

    def chunks(self, size: tuple[int, ...], device: torch.device | None = None) -> Int[Tensor, "g l"]:
        """The tokens of each chunk of a video of this size, -1 pads."""
        if not isinstance(self.chunk, tuple):
            tokens = max(1, int(self.chunk * math.prod(size[1:])))
            return grid_blocks((math.prod(size),), (min(tokens, math.prod(size)),), device=device)
        chunk = (size[0], *self.chunk) if len(self.chunk) == 2 else self.chunk
        return grid_blocks(size, tuple(map(min, chunk, size)), device=device)

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        seen = moba_chunks(
            query,
            key,
            self.chunks(size, query.device),
            select=self.select,
            scope=self.scope,
            threshold=self.threshold,
            topk=self.topk,
        )
        return attention(query, key, value, pattern=seen)
