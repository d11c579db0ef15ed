"""Landmark attention: past blocks are reached through one landmark token each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
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
from heedful.mixers.state import KVState
from heedful.ops.landmark import landmark_attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.registry import register


@register(
    "landmark-attention",
    kind="sequence",
    paper="landmark-attention",
    tags=("sparse", "softmax", "blocks"),
    causal="always",
    decode=True,
    complexity="O(N^2 C)",
)
class LandmarkAttention(Mixer):
    """Causal attention in which a past block shares out, among its tokens, the weight its landmark gets.

        P = softmax over {tokens of the own block so far} and {landmarks of past blocks}
        y_i = W_o (sum over own j: P_ij v_j + sum over past blocks b: P_i,b sum_j softmax_j in b(q_i k_j) v_j)

    Every block of `block_size` tokens is closed by a landmark, a token of its own whose key stands for the
    block and whose value is never read. Queries and keys carry a rotary embedding (neighbouring channels
    paired) at their positions among all tokens, landmarks counted. No projection has a bias.

    dim         channels
    heads       heads, a divisor of `dim`
    block_size  ordinary tokens a block; the authors train with 50 (and 63 for LLaMA)
    insert      True: landmarks, one learned vector, are put in behind every block and taken out of y again.
                False: x holds them already, as every (block_size + 1)-th token, and y too. A stack of
                layers needs this form: only in a layer above can a landmark know what its block says
    retrieve    past blocks that a query of a head sees: those with the largest q . k of their landmarks, the
                only ones in P. The authors train with all of them (None), at the cost of dense attention, and
                fetch a few once trained. The choice passes no gradient
    dropout     share of the attention weights dropped in training

    forward: mask (b, n) hides tokens as keys, and a wholly hidden block with its landmark; positions (n) or
    (b, n) count the tokens of x, and those of the landmarks follow from them.
    Raises ValueError if heads does not divide dim into even widths, and for a context.
    With the weights of a trained layer, `LandmarkMemory` fetches past blocks by their landmarks alone.
    Source: Landmark Attention, arXiv 2305.16300.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "block_size": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        block_size: int = 50,
        insert: bool = True,
        retrieve: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("block_size", block_size)
        if retrieve is not None:
            check_positive("retrieve", retrieve)
        if dim // heads % 2:
            raise ValueError(f"dim / heads is {dim // heads}, must be even for the rotary embedding")
        self.heads, self.head_dim = heads, dim // heads
        self.block_size, self.insert = block_size, insert
        self.retrieve, self.dropout = retrieve, dropout
        self.query = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        if insert:
            self.landmark = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
            nn.init.normal_(self.landmark, std=0.02)

    def init_state(self, batch: int) -> KVState:
        """The state before the first token; its keys and values are those of the landmarks too."""
        return KVState()

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
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        start = 0 if state is None else state.length
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        new = x.shape[1]
        if self.insert:
            x, origin, is_landmark = self.with_landmarks(x, start)
            mask = None if mask is None else mask[:, origin]
            # A landmark comes right behind the last token of its block.
            positions = (positions + positions // self.block_size)[..., origin] + is_landmark

        query, key, value = self.project(x)
        angles = rotary_angles(positions, self.head_dim, dtype=x.dtype)
        query, key = (rotate(y, angles, pairing="interleaved") for y in (query, key))
        seen = mask
        if state is not None:
            # `append` counts keys, landmarks among them; the state counts tokens of x.
            held = 0 if state.key is None else state.key.shape[2]
            state = replace(replace(state, length=held).append(key, value, mask), length=start + new)
            assert state.key is not None
            assert state.value is not None
            key, value, seen = state.key, state.value, state.mask
        dropout = self.dropout if self.training else 0.0
        heads = landmark_attention(
            query,
            key,
            value,
            block_size=self.block_size,
            retrieve=self.retrieve,
            key_mask=seen,
            dropout_p=dropout,
        )
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        y = y[:, self.places(start, new, y.device)] if self.insert else y
        return y if state is None else (y, state)

    def project(
        self, x: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Queries, keys and values before the rotary embedding."""
        query, key, value = (
            rearrange(layer(x), "b n (h d) -> b h n d", d=self.head_dim)
            for layer in (self.query, self.key, self.value)
        )
        return query, key, value

    def places(self, start: int, new: int, device: torch.device) -> Int[Tensor, " n"]:
        """Where `new` tokens, from token `start` of the sequence on, stand once landmarks are among them."""
        token = torch.arange(start, start + new, device=device)
        return token + token // self.block_size - (start + start // self.block_size)

    def with_landmarks(
        self, x: Float[Tensor, "b n c"], start: int
    ) -> tuple[Float[Tensor, "b a c"], Int[Tensor, " a"], Bool[Tensor, " a"]]:
        """x, which begins with token `start` of the sequence, with a landmark behind every full block.

        Also, for every place, the index in x of its token (a landmark's: the last token of its block), and
        whether it is a landmark.
        """
        length, end = self.block_size + 1, start + x.shape[1]
        place = torch.arange(start + start // self.block_size, end + end // self.block_size, device=x.device)
        is_landmark = place % length == self.block_size
        origin = place - place // length - is_landmark.long() - start
        return torch.where(is_landmark[:, None], self.landmark.to(x.dtype), x[:, origin]), origin, is_landmark
