"""Which experts take a whole sequence: one choice for all of its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_mask, check_positive, check_tokens
from heedful.registry import register
from heedful.routing.head_gate import chosen, wide_linear
from heedful.routing.switch_gate import SwitchGate


@register(
    "sequence-gate", kind="routing", paper="uoe", tags=("experts", "router"), complexity="O(N C experts)"
)
class SequenceGate(nn.Module):
    """Probabilities of the experts for each sequence, and which experts take it.

        s = softmax([x_1, ..., x_length] W + b),   a sequence goes to the experts with its `topk` largest s

    The weights have a row for each place and channel, so that there is a longest sequence: a shorter one is
    as if zeros followed, and masked tokens are zeros. The choice reads every token, the last ones too.

    dim      channels of x
    experts  how many there are
    topk     how many take a sequence, at most `experts`
    length   the largest number of tokens

    forward: x (b, n, c), mask (b, n) with True = a token; gives s (b, 1, experts), in float32 at least, and
    the choice (b, 1, experts). Raises ValueError if topk does not fit, on wrong shapes, and on more than
    `length` tokens. Source: Union of Experts (expert selection), arXiv 2503.02495.
    """

    def __init__(
        self,
        dim: int,
        *,
        experts: int,
        topk: int,
        length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("length", length)
        check_positive("topk", topk)
        if topk > experts:
            raise ValueError(f"topk is {topk}, must be at most {experts}, the number to choose from")
        self.dim, self.topk, self.length = dim, topk, length
        self.linear = nn.Linear(length * dim, experts, device=device, dtype=dtype)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b 1 e"], Bool[Tensor, "b 1 e"]]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        n = x.shape[1]
        if n > self.length:
            raise ValueError(f"x has {n} tokens, must have at most length, which is {self.length}")
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        flat = F.pad(x, (0, 0, 0, self.length - n)).flatten(1)[:, None]
        s = wide_linear(flat, self.linear.weight, self.linear.bias).softmax(-1)
        return s, chosen(s, self.topk)


def make_gate(
    dim: int,
    *,
    experts: int,
    topk: int,
    selection: str,
    length: int | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SwitchGate | SequenceGate:
    """The gate of a mixer of experts: one for sequences with selection "sequence", else one for tokens.

    Raises ValueError if `length` is missing for the first or given for the second.
    """
    if selection == "sequence":
        if length is None:
            raise ValueError("length is None, must be the largest number of tokens with selection='sequence'")
        return SequenceGate(dim, experts=experts, topk=topk, length=length, device=device, dtype=dtype)
    if length is not None:
        raise ValueError(f"length is {length}, must be None with selection={selection!r}: any length will do")
    return SwitchGate(dim, experts=experts, topk=topk, device=device, dtype=dtype)
