"""For operators whose backward pass is not differentiable itself: say so instead of giving zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Grads = tuple[Tensor | None, ...]


class _Refuse(Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor, message: str) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(ctx.message)


def differentiable_once(message: str) -> Callable[[Callable[..., Grads]], Callable[..., Grads]]:
    """Decorate `Function.backward`: right gradients whose own gradients raise RuntimeError(message).

    torch's own `once_differentiable` is silent where the incoming gradient is a constant, as in a
    gradient penalty; the second derivative would then be zero without a word.
    """

    def decorate(backward: Callable[..., Grads]) -> Callable[..., Grads]:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grads: Tensor | None) -> Grads:
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return results
            anchor = torch.zeros((), requires_grad=True)
            return tuple(None if r is None else _Refuse.apply(r, anchor, message) for r in results)

        return guarded

    return decorate
