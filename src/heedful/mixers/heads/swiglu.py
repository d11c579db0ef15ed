"""The gated feed-forward net of most language models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive


class SwiGLU(nn.Module):
    """FFN(x) = W_down (silu(W_gate x) * W_up x), without biases.

    dim: channels of x and of the result; hidden: channels between. ValueError unless both are at least 1.
    Source: GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("hidden", hidden)
        self.gate = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows c"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))
