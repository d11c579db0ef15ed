"""Token-aware pooling: every token chooses how far it averages over its neighbours."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "token-aware-pooling",
    kind="grid",
    paper="tap-adl",
    tags=("pooling", "local"),
    aliases=("tap",),
    spatial=(2,),
    complexity="O(N C K)",
)
class TokenAwarePooling(Mixer):
    """A learned mixture, token by token, of 3 x 3 averages at growing distances; stands before an attention.

        m = softmax_k(Conv3x3(BatchNorm(Conv3x3(x))))            K maps, without biases
        y = m_0 x + sum_{k=1}^{K-1} m_k avg_k(x),    avg_k: the mean of 9 tokens, k apart, zeros outside

    dim     channels
    scales  K; 1 leaves x as it is

    The residual of the attention takes the x that goes in here: x += attention(LN(y)).
    Raises ValueError on scales below 1. Source: Robustifying Token Attention for Vision Transformers,
    arXiv 2303.11126.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "scales": 3}

    def __init__(
        self,
        dim: int,
        *,
        scales: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("scales", scales)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scales = scales
        self.proj = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False, **made),
            nn.BatchNorm2d(scales, **made),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False, **made),
        )

    def weights(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b k height width"]:
        """How much each token takes of each distance; sums to 1 over the distances."""
        return self.proj(x).softmax(1)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        weights = self.weights(x)
        y = weights[:, :1] * x
        for distance in range(1, self.scales):
            y = y + weights[:, distance : distance + 1] * spread_mean(x, distance)
        return y


def spread_mean(x: Float[Tensor, "b c height width"], distance: int) -> Float[Tensor, "b c height width"]:
    """The mean of the 3 x 3 tokens that are `distance` apart around each; zeros outside count."""
    height, width = x.shape[2:]
    x = F.pad(x, (distance,) * 4)
    top, middle, bottom = (x[:, :, step : step + height] for step in (0, distance, 2 * distance))
    x = top + middle + bottom
    left, centre, right = (x[..., step : step + width] for step in (0, distance, 2 * distance))
    return (left + centre + right) / 9
