"""Titans: neural memory joined with attention, as a gate, as a layer before it, or as its context."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
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
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.linear.neural_memory import NeuralMemory, NeuralMemoryState
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState, State
from heedful.ops.attention import attention, merge_partials
from heedful.patterns.causal import Causal
from heedful.patterns.sink_window import SinkWindow
from heedful.registry import register


@dataclass(frozen=True)
class TitansState(State):
    """The memory's state, and the keys and values that attention still sees."""

    memory: NeuralMemoryState = field(default_factory=NeuralMemoryState)
    seen: KVState = field(default_factory=KVState)

    def reorder(self, index: Int[Tensor, " b"]) -> Self:
        """The state whose batch row i is row `index[i]` of this one (beam search)."""
        return replace(
            super().reorder(index), memory=self.memory.reorder(index), seen=self.seen.reorder(index)
        )

    def nbytes(self) -> int:
        """Bytes held by the tensors of the state."""
        return super().nbytes() + self.memory.nbytes() + self.seen.nbytes()


@dataclass(frozen=True)
class SegmentState(TitansState):
    """With the memory before the current segment, and the past of the convolution that reads it."""

    before: NeuralMemoryState = field(default_factory=NeuralMemoryState)
    read_past: Float[Tensor, "b past c"] | None = None

    def reorder(self, index: Int[Tensor, " b"]) -> Self:
        return replace(super().reorder(index), before=self.before.reorder(index))

    def nbytes(self) -> int:
        return super().nbytes() + self.before.nbytes()


class _Titans(Mixer):
    """What the three have in common: a memory, persistent tokens ahead of the sequence, and the door."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        persistent: int,
        memory: dict[str, Any] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        if not isinstance(persistent, int) or persistent < 0:
            raise ValueError(f"persistent is {persistent!r}, must be a whole number of at least 0")
        self.heads = heads
        self.memory = NeuralMemory(dim, **(memory or {}), device=device, dtype=dtype)
        self.persistent = nn.Parameter(torch.empty(persistent, dim, device=device, dtype=dtype).normal_())

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: Any = None,
    ) -> Any:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        check_no_context(context, context_mask)
        y, after = self._run(x, mask, self.init_state(x.shape[0]) if state is None else state)
        return y if state is None else (y, after)

    def _run(self, x: Tensor, mask: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError


class _Windowed(_Titans):
    """Attention over the persistent tokens and a sliding window, beside or behind the memory."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 64,
        persistent: int = 4,
        memory: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, persistent=persistent, memory=memory, device=device, dtype=dtype)
        check_positive("window", window)
        self.window = window
        self.attention = SelfAttention(
            dim,
            heads=heads,
            causal=True,
            pattern=SinkWindow(persistent, window),
            qkv_bias=False,
            device=device,
            dtype=dtype,
        )

    def init_state(self, batch: int) -> TitansState:
        """The state before the first token of `batch` sequences: the persistent tokens were read."""
        ahead = self.persistent.expand(batch, -1, -1)
        _, state = self._run(ahead, None, TitansState())
        return replace(state, length=0)

    def _attend(
        self, x: Tensor, mask: Tensor | None, state: KVState
    ) -> tuple[Float[Tensor, "b n c"], KVState]:
        """Attention, and of its state what a later token can see."""
        y, after = self.attention(x, mask=mask, state=state)
        first, last = len(self.persistent), self.window - 1

        def kept(t: Tensor | None, axis: int) -> Tensor | None:
            if t is None or t.shape[axis] <= first + last:
                return t
            rest = t.narrow(axis, t.shape[axis] - last, last)
            return torch.cat([t.narrow(axis, 0, first), rest], dim=axis)

        return y, KVState(after.length, kept(after.key, 2), kept(after.value, 2), kept(after.mask, 1))


@register(
    "titans-mag",
    kind="sequence",
    paper="titans",
    tags=("linear", "memory", "window", "gate"),
    causal="always",
    decode=True,
    complexity="O(N (C^2 + W C)), window W",
)
class TitansMAG(_Windowed):
    """Memory as a gate: attention in a window sees the near, the memory the far, and they are multiplied.

        z = (persistent tokens, x),  y = window attention(z),  m = memory(z)
        o = RMSNorm(y) silu(RMSNorm(m)),  of the tokens of x

    dim         channels
    heads       of attention, divides dim
    window      tokens that a token sees, itself counted; persistent tokens are always seen
    persistent  learned tokens ahead of every sequence
    memory      arguments of `NeuralMemory`

    Norms with learned weights and a nonlinearity are the paper's; that it is a silu, and on the memory alone,
    is heedful's choice, as is that attention has no positions beside its window.
    State: that of the memory, and persistent + window - 1 keys and values. `positions` have no effect.
    Padding: masked tokens are not seen by attention and not learned by the memory.
    Raises ValueError on sizes that do not fit, on wrong shapes, or if a context is given.
    Source: Titans, arXiv 2501.00663.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 2,
        "window": 5,
        "persistent": 3,
        "memory": {"expansion": 2, "chunk_size": 4},
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 64,
        persistent: int = 4,
        memory: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, heads=heads, window=window, persistent=persistent, memory=memory, device=device, dtype=dtype
        )
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.memory_norm = nn.RMSNorm(dim, eps=1e-5, device=device, dtype=dtype)

    def _run(self, x: Tensor, mask: Tensor | None, state: TitansState) -> tuple[Tensor, TitansState]:
        y, seen = self._attend(x, mask, state.seen)
        m, memory = self.memory(x, mask=mask, state=state.memory)
        norms, wide = (self.attention_norm, self.memory_norm), self.memory_norm.weight.dtype
        y, m = (norm(t.to(wide)) for norm, t in zip(norms, (y, m), strict=True))
        o = y * F.silu(m)
        return o, TitansState(state.length + x.shape[1], memory, seen)


@register(
    "titans-mal",
    kind="sequence",
    paper="titans",
    tags=("linear", "memory", "window"),
    causal="always",
    decode=True,
    complexity="O(N (C^2 + W C)), window W",
)
class TitansMAL(_Windowed):
    """Memory as a layer: what the memory gives for the tokens goes through attention in a window.

        z = (persistent tokens, x),  o = window attention(memory(z)),  of the tokens of x

    Arguments, state, padding and errors as in `TitansMAG`. Source: Titans, arXiv 2501.00663.
    """

    example: ClassVar[dict[str, Any]] = TitansMAG.example

    def _run(self, x: Tensor, mask: Tensor | None, state: TitansState) -> tuple[Tensor, TitansState]:
        m, memory = self.memory(x, mask=mask, state=state.memory)
        o, seen = self._attend(m, mask, state.seen)
        return o, TitansState(state.length + x.shape[1], memory, seen)


@register(
    "titans-mac",
    kind="sequence",
    paper="titans",
    tags=("linear", "memory", "gate"),
    causal="always",
    decode=True,
    complexity="O(N (C^2 + S C)), segments of S",
)
class TitansMAC(_Titans):
    """Memory as a context: attention in segments also sees what the memory of the past says to their tokens.

        h_t = M(x_t) with the memory before the segment
        y_t = attention(x_t; persistent tokens, h_s and x_s of the segment, s <= t)
        o_t = y_t M_t(y_t),  where the memory first learns y_t

    The paper lets a token see all h of its segment and multiplies by the memory after the whole segment, so
    that tokens would see later ones; here a token has what came up to it.

    dim         channels
    heads       of attention, divides dim
    segment     tokens of a segment; they count from the first of the sequence
    persistent  learned tokens that every segment sees
    memory      arguments of `NeuralMemory`

    State: that of the memory now and before the segment, and persistent + 2 segment keys and values.
    `positions` have no effect; attention has none. Padding, masked tokens: not seen and not learned, but they
    count in their segment.
    Raises ValueError on sizes that do not fit, on wrong shapes, or if a context is given.
    Source: Titans, arXiv 2501.00663.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 2,
        "segment": 6,
        "persistent": 3,
        "memory": {"expansion": 2, "chunk_size": 4},
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        segment: int = 64,
        persistent: int = 4,
        memory: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, persistent=persistent, memory=memory, device=device, dtype=dtype)
        check_positive("segment", segment)
        self.segment = segment
        self.query, self.key, self.value, self.out = (
            nn.Linear(dim, dim, bias=False, device=device, dtype=dtype) for _ in range(4)
        )

    def init_state(self, batch: int) -> SegmentState:
        """The state before the first token of `batch` sequences."""
        return SegmentState()

    def _run(self, x: Tensor, mask: Tensor | None, state: SegmentState) -> tuple[Tensor, SegmentState]:
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        n = x.shape[1]
        sizes: list[int] = []
        while sum(sizes) < n or not sizes:
            room = self.segment - (state.length + sum(sizes)) % self.segment
            sizes.append(min(room, n - sum(sizes)))
        outs = []
        pieces = x.split(sizes, dim=1)
        masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
        for piece, seen in zip(pieces, masks, strict=True):
            y, state = self._within(piece, seen, state)
            outs.append(y)
        return torch.cat(outs, dim=1), state

    def _within(
        self, x: Float[Tensor, "b n c"], mask: Tensor | None, state: SegmentState
    ) -> tuple[Float[Tensor, "b n c"], SegmentState]:
        """Tokens of one segment."""
        old, before, ahead = state.seen, state.before, self.persistent.expand(len(x), -1, -1)
        if state.length % self.segment == 0:  # a segment begins
            before = state.memory
            old = KVState().append(*self._keys(ahead))
        # 1. What the past says.
        h, read_past = self.memory.read(x, before, past=state.read_past)
        # 2. Attention over what was seen of the segment, and over the new tokens up to each of them.
        query = self._heads(self.query(x))
        assert old.key is not None
        assert old.value is not None
        parts = [attention(query, old.key, old.value, key_mask=old.mask, return_lse=True)]
        new = [self._keys(h), self._keys(x)]
        for key, value in new:
            parts.append(attention(query, key, value, pattern=Causal(), key_mask=mask, return_lse=True))
        y, _ = merge_partials(parts)  # type: ignore[arg-type]
        y = self.out(rearrange(y, "b h n d -> b n (h d)"))
        seen = old
        for key, value in new:
            seen = seen.append(key, value, mask)
        # 3. The memory learns the result and answers it.
        m, memory = self.memory(y, mask=mask, state=state.memory)
        return y * m, SegmentState(state.length + x.shape[1], memory, seen, before, read_past)

    def _keys(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor]:
        return self._heads(self.key(x)), self._heads(self.value(x))

    def _heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)
