"""Which experts take a token: the best of its own choice, or what the whole batch leaves them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.registry import register
from heedful.routing.head_gate import chosen, wide_linear


@register("switch-gate", kind="routing", paper="uoe", tags=("experts", "router"), complexity="O(N C experts)")
class SwitchGate(nn.Module):
    """Probabilities of the experts for each token, and which experts take it.

        s = softmax(x W + b),   a token goes to the experts with its `topk` largest s

    dim      channels of x
    experts  how many there are
    topk     how many take a token, at most `experts`

    forward gives s (b, n, experts), in float32 at least, and the choice (b, n, experts). `published` is the
    authors' choice, which reads all tokens of all rows. Raises ValueError if topk does not fit.
    Source: Union of Experts, arXiv 2503.02495.
    """

    def __init__(
        self,
        dim: int,
        *,
        experts: int,
        topk: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("topk", topk)
        if topk > experts:
            raise ValueError(f"topk is {topk}, must be at most {experts}, the number to choose from")
        self.topk = topk
        self.linear = nn.Linear(dim, experts, device=device, dtype=dtype)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n e"], Bool[Tensor, "b n e"]]:
        s = wide_linear(x, self.linear.weight, self.linear.bias).softmax(-1)
        return s, chosen(s, self.topk)

    def published(
        self, x: Float[Tensor, "b n c"], *, length: int | None = None, eps: float = 1e-8
    ) -> tuple[Float[Tensor, "b n e"], Bool[Tensor, "b n e"]]:
        """Normalised over the batch, then the same number of tokens for every expert and row.

            r = b s / (sum over rows of s + eps) at the chosen experts, 0 elsewhere

        An expert takes the `length` tokens of a row with the largest r, tokens of r = 0 if there are no
        others; None: as many as the fullest expert of the batch has with r > 0. Gives r and the choice.
        """
        s, taken = self(x)
        kept = s * taken
        r = kept / (kept.sum(0, keepdim=True) + eps) * len(x)
        if length is None:
            length = int((r > 0).sum(1).max()) if r.numel() else 0
        best = r.topk(length, dim=1).indices
        return r, torch.zeros_like(taken).scatter(1, best, True)
