"""Long recurrences in segments: the backward pass keeps one state a segment and computes the rest again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from heedful.ops.precision import no_autocast


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
    states  tensors of the state before the first token; no other tensor that `run` uses gets a gradient
    sizes   lengths of the pieces, which sum to n
    keep    up to this many tokens all that backward needs is kept; of more, only the states before each piece

    Gives (out, *states), the outputs joined along axis 2 and the states after the last token.
    """
    again = sum(sizes) > keep and torch.is_grad_enabled()
    again = again and any(x.requires_grad for x in (*tokens, *states))
    if again and not torch.compiler.is_compiling():
        return _Again.apply(run, sizes, len(tokens), *tokens, *states)
    return _joined(run, tokens, states, sizes, again)


def _joined(
    run: Callable[..., tuple[Tensor, ...]],
    tokens: Sequence[Tensor],
    states: Sequence[Tensor],
    sizes: list[int],
    again: bool,
) -> tuple[Tensor, ...]:
    outs = []
    for pieces in zip(*(x.split(sizes, dim=2) for x in tokens), strict=True):
        if again:
            out, *states = checkpoint(run, *pieces, *states, use_reentrant=False, preserve_rng_state=False)
        else:
            out, *states = run(*pieces, *states)
        outs.append(out)
    return (torch.cat(outs, dim=2), *states)


class _Again(Function):
    """`_joined` with again=True, but outputs and gradients are written where they belong, piece by piece.

    Pieces joined in the end would all wait in memory new from the system, which costs a CPU as much as a
    quarter of the sums.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, ...]], sizes: list[int], count: int, *given: Tensor
    ) -> tuple[Tensor, ...]:
        tokens = given[:count]
        states: Sequence[Tensor] = given[count:]
        kept: list[Tensor] = []
        whole: Tensor | None = None
        for at, size in zip(_starts(sizes), sizes, strict=True):
            kept += states
            out, *states = run(*(x.narrow(2, at, size) for x in tokens), *states)
            if whole is None:
                whole = out.new_empty(*out.shape[:2], sum(sizes), *out.shape[3:])
            whole.narrow(2, at, size).copy_(out)
        assert whole is not None  # there is a token
        ctx.run, ctx.sizes, ctx.count, ctx.given = run, sizes, count, len(given)
        ctx.save_for_backward(*given, *kept[len(states) :])
        ctx.set_materialize_grads(False)
        return (whole, *states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given, kept = ctx.saved_tensors[: ctx.given], ctx.saved_tensors[ctx.given :]
        wanted = ctx.needs_input_grad[3:]
        with no_autocast(given[0]):
            if torch.is_grad_enabled():  # to be differentiated again: the states need their history
                given = tuple(x.view_as(x) for x in given)
                results = _joined(ctx.run, given[: ctx.count], given[ctx.count :], ctx.sizes, True)
                return (None, None, None, *_pulled(results, grads, given, wanted, create_graph=True))
            before = (*given[ctx.count :], *kept)
            return (None, None, None, *_backward(ctx, given[: ctx.count], before, grads, wanted))


def _backward(
    ctx: Any,
    tokens: Sequence[Tensor],
    before: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The last piece first; `before` holds the states before each piece."""
    count, width = len(tokens), len(before) // len(ctx.sizes)
    whole = [torch.empty_like(x) if want else None for x, want in zip(tokens, wanted, strict=False)]
    zero = tokens[0].new_zeros(())
    grad, *after = grads
    for i, at in reversed(list(enumerate(_starts(ctx.sizes)))):
        size = ctx.sizes[i]
        pieces = [x.narrow(2, at, size) for x in tokens] + list(before[i * width : (i + 1) * width])
        # States need gradients even where the first does not: they lead to the pieces before.
        need = [*wanted[:count], *(wanted[count:] if i == 0 else [True] * width)]
        with torch.enable_grad():
            pieces = [x.detach().requires_grad_(want) for x, want in zip(pieces, need, strict=True)]
            results = ctx.run(*pieces)
        found = _pulled(results, (None if grad is None else grad.narrow(2, at, size), *after), pieces, need)
        for target, piece in zip(whole, found, strict=False):
            if target is not None:
                target.narrow(2, at, size).copy_(zero if piece is None else piece)
        after = found[count:]
    return [*whole, *after]


def _pulled(
    results: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    given: Sequence[Tensor],
    wanted: Sequence[bool],
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of those that are wanted, None for the rest and for what the results do not depend on."""
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad]
    if not pairs:
        return [None] * len(given)
    ends, starts = zip(*pairs, strict=True)
    chosen = [x for x, want in zip(given, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(ends, chosen, starts, allow_unused=True, create_graph=create_graph))
    return [next(found) if want else None for want in wanted]


def _starts(sizes: list[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes[:-1])]
