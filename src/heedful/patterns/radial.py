"""Windows between the frames of a video that halve as the frames move apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from heedful.checks import check_positive
from heedful.kept import kept
from heedful.patterns.pattern import Pattern
from heedful.patterns.separable import brief, grid_shape
from heedful.patterns.table import Table
from heedful.registry import register

_THINNEST = 128  # bands thinner than this thin out over frames; the authors' number, at every block size


@register("radial", kind="pattern", paper="radial-attention", tags=("sparse", "video", "block"))
@dataclass(frozen=True)
class Radial(Pattern):
    """Blocks of a video's tokens see the blocks near their place in other frames, fewer the farther away.

    With P tokens a frame, bl the bit length of a number and D = |i - j| for frames i and j:
      sink     frame 0 is seen whole, if sink_frame
      thinning L = 2^bl(P) / 2^bl(D); where L < 128, only every int(128 / L)-th distance D is kept
      band     places r of frame i and c of frame j with |r - c| <= max(L * decay, block_size); all for D <= 1
    A block of block_size x block_size pairs of the whole sequence is kept for a pair of frames if, of its
    columns that hold a pair of the band, more than 60 % hold more than block_size / 3; it is visible if
    kept for any pair of frames. Places are row-major inside a frame, so that the band is one of rows.

    shape       (frames, height, width), or (frames, tokens of a frame); frame after frame in the sequence
    decay       scale of the bands, e.g. 0.2 (Wan 2.1), 0.8 (Wan 2.2), 0.95 (HunyuanVideo)
    block_size  tokens of a block
    sink_frame  True for the Wan models
    text        tokens after the video, which see all and are seen by all; so does a video's last block
                that they cut short
    Where frames are no multiple of the blocks, thin slices at their borders can be lost, as published; frames
    thinner than a third of a block can lose all. ValueError on sizes that are not positive.
    Source: Radial Attention, arXiv 2506.19852.
    """

    example: ClassVar[dict[str, Any]] = {"shape": (4, 2, 8), "block_size": 4}

    shape: Sequence[int]
    decay: float = 1.0
    block_size: int = 128
    sink_frame: bool = False
    text: int = 0
    exact_tiles = True
    _blocks: ClassVar[Table]  # set on the instances, and no part of their value
    _counts: ClassVar[Table]

    def __post_init__(self) -> None:
        shape = grid_shape(self.shape)
        if len(shape) < 2:
            raise ValueError(f"shape is {shape}, must be (frames, height, width) or (frames, tokens)")
        check_positive("block_size", self.block_size)
        if self.decay <= 0:
            raise ValueError(f"decay is {self.decay}, must be positive")
        if self.text < 0:
            raise ValueError(f"text is {self.text}, must be at least 0")
        object.__setattr__(self, "shape", shape)
        seen = _seen_blocks(
            shape[0], math.prod(shape[1:]), self.decay, self.block_size, self.sink_frame, self.text
        )
        object.__setattr__(self, "_blocks", Table(seen))
        # counts[i, j]: visible blocks above and left of block (i, j)
        object.__setattr__(self, "_counts", Table(F.pad(seen.long().cumsum(0).cumsum(1), (1, 0, 1, 0))))

    def check(self, n: int, m: int, query_offset: int) -> None:
        tokens = math.prod(self.shape) + self.text
        if m != tokens or query_offset < 0 or query_offset + n > m:
            raise ValueError(
                f"{self} is for {tokens} keys and queries among them, "
                f"was given {m} keys and queries at positions {query_offset} to {query_offset + n - 1}"
            )

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        blocks = self._blocks.on(q.device)
        last = blocks.shape[0] - 1
        return blocks[(q // self.block_size).clamp(max=last), (k // self.block_size).clamp(max=last)]

    def tiles(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> tuple[Tensor, Tensor]:
        counts = self._counts.on(q_lo.device)
        top, left = q_lo // self.block_size, k_lo // self.block_size
        bottom, right = q_hi // self.block_size + 1, k_hi // self.block_size + 1
        inside = counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left]
        return inside > 0, inside == (bottom - top) * (right - left)

    def __str__(self) -> str:
        parts = [brief(self.shape), f"decay={self.decay}", f"block_size={self.block_size}"]
        if self.sink_frame:
            parts.append("sink_frame=True")
        if self.text:
            parts.append(f"text={self.text}")
        return f"Radial({', '.join(parts)})"


@kept(16)
def _seen_blocks(
    frames: int, tokens: int, decay: float, size: int, sink_frame: bool, text: int
) -> Bool[Tensor, "nb nb"]:
    """Which blocks of the sequence see which."""
    total = -(-(frames * tokens + text) // size)
    seen = torch.zeros(total, total, dtype=torch.bool)
    tail = frames * tokens // size
    seen[tail:] = True
    seen[:, tail:] = True
    for i, j in itertools.product(range(frames), repeat=2):
        reach = tokens if sink_frame and j == 0 else _reach(abs(i - j), tokens, decay, size)
        if reach is None:
            continue
        kept = _kept(tokens, reach, i * tokens % size, j * tokens % size, size)
        row, column = i * tokens // size, j * tokens // size
        part = seen[row : row + kept.shape[0], column : column + kept.shape[1]]
        part |= kept[: part.shape[0], : part.shape[1]]
    return seen


def _reach(distance: int, tokens: int, decay: float, size: int) -> int | None:
    """Half the width of the band between two frames; None where the pair is dropped."""
    length = 2.0 ** (tokens.bit_length() - distance.bit_length())
    if length < _THINNEST and distance % int(_THINNEST / length):
        return None
    return tokens if distance <= 1 else int(max(length * decay, size))


@kept(1024)
def _kept(tokens: int, reach: int, above: int, left: int, size: int) -> Bool[Tensor, "rows columns"]:
    """The blocks kept for one pair of frames that begin `above` and `left` of a block border."""
    blocks = -(-tokens // size)  # of the slice beyond these, if there is one, the authors take no account
    column = torch.arange(blocks * size) - left
    first = torch.arange(blocks)[:, None] * size - above
    low = (column - reach).maximum(first).clamp(min=0)
    high = (column + reach).minimum(first + size - 1).clamp(max=tokens - 1)
    count = (high - low + 1).clamp(min=0) * ((column >= 0) & (column < tokens))
    count = count.unflatten(1, (blocks, size))
    many, some = (3 * count > size).sum(-1), (count > 0).sum(-1)
    return 5 * many > 3 * some
