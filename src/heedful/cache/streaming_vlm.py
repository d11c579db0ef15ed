"""Endless video chats: the cache is cut and moved by segments between rounds, and its keys turned to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.cache.layer import PolicyCache, PolicyLayer
from heedful.cache.mrope import MultiRotation, multi_rotation_of
from heedful.checks import check_positive
from heedful.registry import register

Places = tuple[int, ...]  # of tokens in the cache


@dataclass(frozen=True)
class Round:
    """A user's turn and the answer, as places in the cache: what is left of them.

    user = before + time + vision + after (the time stamp and the vision segment may be gone)
    answer = opening + words + closing
    """

    before: Places = ()
    time: Places = ()
    vision: Places = ()
    after: Places = ()
    opening: Places = ()
    words: Places = ()
    closing: Places = ()

    @property
    def places(self) -> Places:
        return self.before + self.time + self.vision + self.after + self.opening + self.words + self.closing


@dataclass(frozen=True)
class Stream:
    """A chat as places in the cache: the block of earlier text (head, text, tail), then the rounds."""

    head: Places
    text: Places
    tail: Places
    rounds: tuple[Round, ...] = field(default=())

    @property
    def places(self) -> Places:
        """All places, in their order."""
        return self.head + self.text + self.tail + tuple(chain(*(r.places for r in self.rounds)))

    def renumbered(self) -> Stream:
        """The same stream in a cache that holds only its places, in their order."""
        at = {place: i for i, place in enumerate(self.places)}

        def moved(part: Places) -> Places:
            return tuple(at[p] for p in part)

        rounds = tuple(Round(**{name: moved(part) for name, part in vars(r).items()}) for r in self.rounds)
        return Stream(moved(self.head), moved(self.text), moved(self.tail), rounds)


def cut_stream(
    stream: Stream,
    number: int,
    *,
    text_rounds: int = 16,
    visual_rounds: int = 16,
    text_sink: int | None = 512,
    text_window: int | None = 512,
) -> Stream:
    """What is left of a stream at the start of round `number` (counted from 0), before its new tokens.

    1. From round text_rounds on, the words of the oldest answer join the block of earlier text, and the rest
       of that answer goes, with the time stamp of its round where visual_rounds > text_rounds.
    2. From round visual_rounds on, the oldest vision segment goes, where visual_rounds < text_rounds.
    3. From round max(text_rounds, visual_rounds) on, what is left of the oldest user turn goes.
    4. From round 1 on the block of earlier text keeps its head with text_sink tokens, and its last
       text_window tokens, the tail among them. One of the two None counts as 0, both: the block is not cut.

    Source: StreamingVLM, arXiv 2510.09608.
    """
    check_positive("text_rounds", text_rounds)
    check_positive("visual_rounds", visual_rounds)
    rounds, text = list(stream.rounds), stream.text
    if number >= text_rounds and (i := _oldest(rounds, "words", "opening", "closing")) is not None:
        text += rounds[i].words
        time = () if visual_rounds > text_rounds else rounds[i].time
        rounds[i] = replace(rounds[i], time=time, opening=(), words=(), closing=())
    if (
        visual_rounds <= number
        and visual_rounds < text_rounds
        and (i := _oldest(rounds, "vision")) is not None
    ):
        rounds[i] = replace(rounds[i], vision=())
    if number >= max(text_rounds, visual_rounds) and (i := _oldest(rounds, "before", "after")) is not None:
        rounds[i] = replace(rounds[i], before=(), time=(), vision=(), after=())
    if number > 0 and not (text_sink is None and text_window is None):
        behind = max(0, (text_window or 0) - len(stream.tail))  # words before the tail
        sink = text_sink or 0
        if sink + behind < len(text):
            text = text[:sink] + text[len(text) - behind :]
    return replace(stream, text=text, rounds=tuple(r for r in rounds if r.places))


def _oldest(rounds: Sequence[Round], *parts: str) -> int | None:
    """The first round that has any of these parts."""
    return next((i for i, r in enumerate(rounds) if any(getattr(r, part) for part in parts)), None)


@register("streaming-vlm", kind="cache", paper="streaming-vlm", tags=("cache", "video", "window"))
class StreamingVLMCache(PolicyCache):
    """A cache whose entries can be cut and moved between calls, keys turned to their new positions.

    Positions of a stream stay contiguous: after a cut they are those of the kept tokens as if they were the
    whole text, on the three axes of M-RoPE. A key at place p that came from position a and now stands at b is
    turned by the angles of b - a, which is what rotating the raw key to b gives. With nothing cut it is a
    full cache. One sequence.

    model  a model with rotary positions, on one axis or M-RoPE, or its configuration

        stream = cut_stream(stream, number)
        after = mrope_positions(is_video[kept], grids_left)          # kept = list(stream.places)
        cache.rearrange(stream.places, before[:, kept], after)
        stream = stream.renumbered()

    The next call of the model is given its own `position_ids`, which go on from the last ones.
    Raises ValueError without rotary positions. Source: StreamingVLM, arXiv 2510.09608.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig) -> None:
        rotation = multi_rotation_of(model)
        super().__init__(model, lambda _: StreamingVLMLayer(rotation))

    def rearrange(
        self,
        places: Sequence[int],
        before: Float[Tensor, "axes k"] | Int[Tensor, "axes k"],
        after: Float[Tensor, "axes k"] | Int[Tensor, "axes k"],
    ) -> None:
        """Keep the entries at `places`, in this order, and move them from positions `before` to `after`.

        before, after  (1 or 3, k): positions of the kept tokens on one axis or the three of M-RoPE
        """
        for name, positions in (("before", before), ("after", after)):
            if positions.ndim != 2 or positions.shape[0] not in (1, 3) or positions.shape[1] != len(places):
                raise ValueError(
                    f"{name} has shape {tuple(positions.shape)}, must be (1 or 3, {len(places)})"
                )
        for layer in self.layers:
            if not isinstance(layer, StreamingVLMLayer):
                raise ValueError(
                    f"the model has a {type(layer).__name__}, whose entries cannot be moved; "
                    "all layers must have full attention"
                )
            layer.rearrange(places, after - before)


class StreamingVLMLayer(PolicyLayer):
    """One layer of a `StreamingVLMCache`."""

    def __init__(self, rotation: MultiRotation) -> None:
        super().__init__()
        self.rotation = rotation

    def rearrange(self, places: Sequence[int], by: Tensor) -> None:
        self.settle()
        index = torch.tensor(places, dtype=torch.long, device=self.keys.device)
        self.keep(index[None])
        self.keys = self.rotation.turn(self.keys, by[:, None].to(self.keys.device))
        self.seen = len(places)
