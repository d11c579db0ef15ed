"""The feed-forward net of Motif: its gate is a polynomial of normalised powers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.mixers.heads.swiglu import SwiGLU


class PolyNorm(nn.Module):
    """A polynomial of powers, each normalised over the last axis.

        PolyNorm(x) = w_0 n(x^3) + w_1 n(x^2) + w_2 n(x) + b,   n(z) = z / sqrt(mean z^2 + eps)

    Four numbers are learned: `weight` (3,), which starts at a third each, and `bias` (1,), at 0. Powers are
    taken in float32 at least, of x divided by its largest channel where that is above 1, so that no finite
    input overflows; the result has the dtype of x.
    Source: Grouped Differential Attention (Motif), arXiv 2510.06949.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((3,), 1 / 3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows c"]:
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        # n((z / a)^p) with eps / a^2p is n(z^p) for any a, which therefore needs no gradient.
        a = z.detach().abs().amax(-1, keepdim=True).clamp(min=1.0)
        z = z / a
        weight, y = self.weight.to(z.dtype), self.bias.to(z.dtype)
        for w, power in zip(weight, (3, 2, 1), strict=True):
            u = z**power
            y = y + w * u * (u.square().mean(-1, keepdim=True) + self.eps * a ** (-2 * power)).rsqrt()
        return y.to(x.dtype)


class PolyNormGLU(SwiGLU):
    """FFN(x) = W_down (PolyNorm(W_gate x) * W_up x): `SwiGLU` with another gate, without biases but its own.

    dim: channels of x and of the result; hidden: channels between. ValueError unless both are at least 1.
    Source: Grouped Differential Attention (Motif), arXiv 2510.06949.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, hidden=hidden, device=device, dtype=dtype)
        self.act = PolyNorm(device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows c"]:
        return self.down(self.act(self.gate(x)) * self.up(x))
