"""MambAttention: attention and Mamba along time, then along frequency, with one attention for both."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.mixers.mixer import Mixer
from heedful.mixers.scan.mamba import Mamba
from heedful.registry import register


class BidirectionalMamba(nn.Module):
    """A Mamba in each direction, each with its norm and residual, joined by a linear map.

        f = x + mamba_1(norm_1(x)),  b = x + flip(mamba_2(norm_2(flip(x)))),  y = W (f, b) + c

    norm is RMSNorm. Arguments as in `heedful.mixers.scan.mamba.Mamba`; eps of the norms.
    Source: MambAttention, arXiv 2507.00966.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 16,
        conv_size: int = 4,
        expand: int = 4,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def mamba() -> Mamba:
            return Mamba(
                dim, state_dim=state_dim, conv_size=conv_size, expand=expand, device=device, dtype=dtype
            )

        self.ahead, self.back = mamba(), mamba()
        self.ahead_norm = nn.RMSNorm(dim, eps=eps, device=device, dtype=dtype)
        self.back_norm = nn.RMSNorm(dim, eps=eps, device=device, dtype=dtype)
        self.join = nn.Linear(2 * dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        ahead = x + self.ahead(self.ahead_norm(x))
        back = x + self.back(self.back_norm(x.flip(1))).flip(1)
        return self.join(torch.cat([ahead, back], dim=-1))


@register(
    "mambattention",
    kind="grid",
    paper="mambattention",
    tags=("state space", "dense", "axial", "audio"),
    spatial=(2,),
    complexity="O(N (T + F) C), map T x F",
)
class MambAttention(Mixer):
    """On every row of time, then on every column of frequency: attention, then Mamba in both directions.

        along time       x += attention(LN(x)),  x += bimamba_t(x)
        along frequency  x += attention(LN(x)),  x += bimamba_f(x)

    for maps (b, c, time, frequency). Attention and its norm are the same modules both times, so that what is
    learned of one axis serves the other; the Mambas (`BidirectionalMamba`) are not shared. Residuals are
    inside.

    dim        channels
    heads      of the attention, divides dim
    state_dim, conv_size, expand   of the Mambas

    Raises ValueError if heads does not divide dim. Source: MambAttention, arXiv 2507.00966.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "state_dim": 4, "expand": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        state_dim: int = 16,
        conv_size: int = 4,
        expand: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attention = SelfAttention(dim, heads=heads, device=device, dtype=dtype)

        def mamba() -> BidirectionalMamba:
            return BidirectionalMamba(
                dim, state_dim=state_dim, conv_size=conv_size, expand=expand, device=device, dtype=dtype
            )

        self.time, self.frequency = mamba(), mamba()

    def forward(self, x: Float[Tensor, "b c time frequency"]) -> Float[Tensor, "b c time frequency"]:
        check_map("x", x, self.dim, self.entry.spatial)
        x = self._along(x.permute(0, 3, 2, 1), self.time)  # b f t c
        x = self._along(x.transpose(1, 2), self.frequency)  # b t f c
        return x.permute(0, 3, 1, 2)

    def _along(
        self, x: Float[Tensor, "b rows n c"], mamba: BidirectionalMamba
    ) -> Float[Tensor, "b rows n c"]:
        rows = x.flatten(0, 1)
        rows = rows + self.attention(self.norm(rows))
        return (rows + mamba(rows)).view(x.shape)
