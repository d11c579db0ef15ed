"""DOLG pool: the mean of normalised features, each weighed by a positive score of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.mixer import Mixer
from heedful.mixers.pooling.token_attention import mean_token, norm_tokens, visible_tokens
from heedful.registry import register


@register(
    "dolg-pool",
    kind="pool",
    paper="efficient-probing",
    tags=("pooling", "probe"),
    complexity="O(N C^2)",
)
class DOLGPool(Mixer):
    """The mean of the features' directions, weighed token by token and without a softmax.

        z = BatchNorm(W1 x + b1)
        y = mean_n softplus(w2 . relu(z_n) + b2) z_n / |z_n|

    In training the statistics of the norm run over all visible tokens of the batch (over fewer than two
    tokens it keeps the running ones).

    dim  channels
    out  channels of the result; None: dim

    `mask` (b, n) hides tokens where it is False; a row without tokens gives zeros.
    Raises ValueError if out is below 1.
    Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image Modeling,
    arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        out: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        out = dim if out is None else out
        check_positive("out", out)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Linear(dim, out, **made)
        self.bn = nn.BatchNorm1d(out, **made)
        self.conv2 = nn.Linear(out, 1, **made)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b e"]:
        x = visible_tokens(x, self.dim, mask)
        z = norm_tokens(self.bn, self.conv1(x), mask)
        y = F.softplus(self.conv2(z.relu())) * F.normalize(z, dim=-1)
        return mean_token(y if mask is None else y.masked_fill(~mask[..., None], 0), mask)[:, 0]
