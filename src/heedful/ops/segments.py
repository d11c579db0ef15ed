"""Long recurrences in segments: the backward pass keeps one state a segment and computes the rest again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def segment_sizes(n: int, *, segment: int, chunk: int, first: int = 0) -> list[int]:
    """Lengths of the pieces of n tokens: a first one of at most `first`, segments, whole chunks, the rest.

    `segment` is a multiple of `chunk`; pieces of no token are left out.
    """
    first = min(first, n)
    whole, rest = divmod(n - first, segment)
    return [size for size in (first, *[segment] * whole, rest - rest % chunk, rest % chunk) if size]


def in_segments(
    run: Callable[..., tuple[Tensor, ...]],
    tokens: Sequence[Tensor],
    states: Sequence[Tensor],
    *,
    sizes: list[int],
    keep: int,
) -> tuple[Tensor, ...]:
    """Run a recurrence piece by piece: `run(*tokens of the piece, *states)` gives (out, *states).

    tokens  tensors whose axis 2 are the n tokens, n at least 1; so is `out`
    states  tensors of the state before the first token
    sizes   lengths of the pieces, which sum to n
    keep    up to this many tokens all that backward needs is kept; of more, only the states before each piece

    Gives (out, *states), the outputs joined along axis 2 and the states after the last token.
    """
    again = sum(sizes) > keep and torch.is_grad_enabled()
    again = again and any(x.requires_grad for x in (*tokens, *states))
    outs = []
    for pieces in zip(*(x.split(sizes, dim=2) for x in tokens), strict=True):
        if again:
            out, *states = checkpoint(run, *pieces, *states, use_reentrant=False, preserve_rng_state=False)
        else:
            out, *states = run(*pieces, *states)
        outs.append(out)
    return (torch.cat(outs, dim=2), *states)
