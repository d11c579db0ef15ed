"""Errors at the door: each names the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_positive(name: str, value: int) -> None:
    """A whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, must be a whole number of at least 1")


def check_divides(small_name: str, small: int, big_name: str, big: int) -> None:
    """`small` divides `big`."""
    check_positive(small_name, small)
    if big % small:
        raise ValueError(f"{small_name} is {small}, must divide {big_name}, which is {big}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(map(repr, choices))}")


def check_stages(stages: int, **lists: Sequence[object]) -> None:
    """Raise ValueError unless each list has one entry for each stage."""
    for name, values in lists.items():
        if len(values) != stages:
            raise ValueError(f"{name} is {tuple(values)}, must have {stages} entries, one for each stage")


def check_tokens(name: str, x: Tensor, dim: int) -> None:
    """Tokens of shape (batch, tokens, dim)."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, must be (batch, tokens, {dim})")


def check_map(name: str, x: Tensor, dim: int | None, spatial: tuple[int, ...]) -> None:
    """A map (batch, dim, *space) with one of the given numbers of spatial axes, none of them empty."""
    axes = {1: "length", 2: "height, width", 3: "time, height, width"}
    if x.ndim - 2 not in spatial or (dim is not None and x.shape[1] != dim):
        channels = "channels" if dim is None else str(dim)
        wanted = " or ".join(f"(batch, {channels}, {axes[s]})" for s in spatial)
        raise ValueError(f"{name} has shape {tuple(x.shape)}, must be {wanted}")
    if 0 in x.shape[2:]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, every spatial axis must have at least 1 element"
        )


def check_mask(name: str, mask: Tensor | None, batch: int, length: int) -> None:
    """A boolean mask (batch, length), True = may be seen; None passes."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != (batch, length):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} and dtype {mask.dtype}, "
            f"must be a bool tensor of shape ({batch}, {length}), True = may be seen"
        )


def check_positions(name: str, positions: Tensor | None, batch: int, length: int) -> None:
    """Positions of the tokens, (length) or (batch, length); None passes."""
    if positions is not None and positions.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"{name} has shape {tuple(positions.shape)}, must be ({length},) or ({batch}, {length})"
        )


def check_no_context(context: Tensor | None, context_mask: Tensor | None) -> None:
    """Neither is given: for mixers of one sequence."""
    for name, given in (("context", context), ("context_mask", context_mask)):
        if given is not None:
            raise ValueError(f"{name} is given, must be None: this mixer has no cross attention")
