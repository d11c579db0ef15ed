"""Landmark attention over a memory: the few blocks fetched whose landmarks answer the query best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_choice, check_positive, check_tokens
from heedful.mixers.sparse.landmark_attention import LandmarkAttention
from heedful.mixers.state import State
from heedful.ops.attention import merge_partials
from heedful.ops.landmark import landmark_attention, two_step_weights
from heedful.ops.rotary import rotary_angles, rotate

SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")
POSITIONS = ("stingy", "true")
_CHUNK = 1 << 24  # numbers of fetched keys held in one go


@dataclass(frozen=True)
class LandmarkMemoryState(State):
    """Keys, before the rotary embedding, and values: whole blocks, oldest first, then the unfinished one."""

    key: Float[Tensor, "b h m d"] | None = None
    value: Float[Tensor, "b h m d"] | None = None


class LandmarkMemory(nn.Module):
    """Inference with a trained `LandmarkAttention`, piece by piece; each query fetches `topk` past blocks.

    With L = block_size + 1 and n blocks held, for a piece of tokens:
      1. the landmark of block i is placed at slot_i L + L - 1, slot_i = max(0, i + 1 - (n - topk)), and
         softmax over blocks of its score ranks the blocks;
      2. each query takes the topk best, in order of time; the tokens of the r-th get the positions
         (r + (slot > 0)) L + 0 ... L - 1: old blocks are squeezed together, the last topk keep their places;
      3. the piece begins at min(blocks seen, topk + 1) L + r, with r tokens of an unfinished block before it;
      4. landmark attention over the fetched blocks, the unfinished block and the piece.

    mixer      the trained layer; with insert=False x holds the landmarks
    blocks     how many whole blocks are held; the oldest go first
    topk       how many of them a query sees; 0: none
    selection  "per_token_and_head"; "max_over_heads": the same blocks for all heads, by the best score;
               "max_over_tokens": the same for all queries of the piece
    positions  "stingy": as above, so that no position exceeds (topk + 2) L and the piece; "true": blocks and
               pieces keep their own. With topk >= n the result is then that of the mixer itself

    memory(x, state) gives (y, state). Blocks that the piece itself completes are seen in full, as in
    training. With n <= topk blocks held their stingy places reach into the piece, as with the authors.
    Raises ValueError on topk below 0 and on unknown names.
    Source: Landmark Attention, arXiv 2305.16300.
    """

    def __init__(
        self,
        mixer: LandmarkAttention,
        *,
        blocks: int,
        topk: int = 1,
        selection: str = "per_token_and_head",
        positions: str = "stingy",
    ) -> None:
        super().__init__()
        check_positive("blocks", blocks)
        if not isinstance(topk, int) or topk < 0:
            raise ValueError(f"topk is {topk!r}, must be a whole number of at least 0")
        check_choice("selection", selection, SELECTIONS)
        check_choice("positions", positions, POSITIONS)
        self.mixer, self.blocks, self.topk = mixer, blocks, topk
        self.selection, self.positions = selection, positions

    def init_state(self, batch: int) -> LandmarkMemoryState:
        """The state before the first token of `batch` sequences."""
        return LandmarkMemoryState()

    def forward(
        self, x: Float[Tensor, "b n c"], state: LandmarkMemoryState
    ) -> tuple[Float[Tensor, "b n c"], LandmarkMemoryState]:
        mixer, length = self.mixer, self.mixer.block_size + 1
        check_tokens("x", x, mixer.dim)
        new, before = x.shape[1], state.length  # `before` counts places, landmarks among them
        if mixer.insert:
            before += state.length // mixer.block_size
            x, _, _ = mixer.with_landmarks(x, state.length)
        finished, unfinished = divmod(before, length)
        query, key, value = mixer.project(x)
        if state.key is not None and state.value is not None:
            key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
        held = (key.shape[2] - x.shape[1]) // length
        first = (min(finished, self.topk + 1) if self.positions == "stingy" else finished) * length

        query = self._turn(query, torch.arange(x.shape[1], device=x.device) + first + unfinished)
        near_key, near_value = key[:, :, held * length :], value[:, :, held * length :]
        near_key = self._turn(near_key, torch.arange(near_key.shape[2], device=x.device) + first)
        parts = [
            landmark_attention(query, near_key, near_value, block_size=mixer.block_size, return_lse=True)
        ]
        if held and self.topk and x.shape[1]:
            far = [y[:, :, : held * length].unflatten(2, (held, length)) for y in (key, value)]
            parts.append(self._fetch(query, far[0], far[1], finished))
        heads, _ = merge_partials(parts)  # type: ignore[arg-type]
        y = mixer.out(rearrange(heads, "b h n d -> b n (h d)"))
        if mixer.insert:
            y = y[:, mixer.places(state.length, new, y.device)]
        oldest = max(0, key.shape[2] // length - self.blocks) * length
        return y, LandmarkMemoryState(state.length + new, key[:, :, oldest:], value[:, :, oldest:])

    def _fetch(self, query: Tensor, key: Tensor, value: Tensor, finished: int) -> tuple[Tensor, Tensor]:
        """(out, lse) over the blocks each query takes out of key (b, h, held, length, d)."""
        held, length, d = key.shape[2:]
        topk, device, dtype = min(self.topk, held), query.device, value.dtype
        query, key, value = (y.to(torch.promote_types(dtype, torch.float32)) for y in (query, key, value))
        place = torch.arange(held, device=device)
        if self.positions == "stingy":
            place = (place + 1 - (held - topk)).clamp(min=0)  # the slots
        else:
            place = place + finished - held
        landmark = self._turn(key[..., -1, :], place * length + length - 1)
        rank = (query @ landmark.mT * d**-0.5).softmax(-1)
        if self.selection == "max_over_heads":
            rank = rank.amax(1, keepdim=True).expand_as(rank)
        elif self.selection == "max_over_tokens":
            rank = rank.amax(2, keepdim=True).expand_as(rank)
        chosen = rank.topk(topk, dim=-1).indices.sort(-1).values  # (b, h, n, topk), oldest first
        block = place[chosen]
        if self.positions == "stingy":
            block = torch.arange(topk, device=device) + (block > 0)

        b, h, n, _ = query.shape
        row = torch.arange(b, device=device)[:, None, None, None]
        head = torch.arange(h, device=device)[:, None, None]
        parts = []
        step = max(1, _CHUNK // (b * h * topk * length * d))
        for start in range(0, n, step):
            part = slice(start, start + step)
            index = chosen[:, :, part]
            position = block[:, :, part, :, None] * length + torch.arange(length, device=device)
            keys = self._turn(key[row, head, index], position)
            scores = torch.einsum("bhnd,bhnkld->bhnkl", query[:, :, part], keys) * d**-0.5
            weights, lse = two_step_weights(scores)
            values = value[row, head, index][..., :-1, :]
            parts.append((torch.einsum("bhnkl,bhnkld->bhnd", weights, values), lse))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2).to(dtype), torch.cat(lses, 2)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = rotary_angles(positions, self.mixer.head_dim, dtype=x.dtype)
        return rotate(x, angles, pairing="interleaved")
