"""Dense attention with a depthwise convolution of its input beside it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register


@register(
    "attention-lepe",
    kind="grid",
    paper="biformer",
    tags=("dense",),
    spatial=(2,),
    complexity="O(N^2 C)",
)
class AttentionLePE(Mixer):
    """Multi-head attention of all tokens, with a locally enhanced position encoding.

        y = Wo (softmax(head_dim^-1/2 q k^T) v + DWConv(x)),   q, k, v = Wqkv x without bias

    The convolution looks at x, not at v: the last stage of BiFormer.

    dim          channels
    heads        divides dim; the released models have 8 at every width
    lepe_kernel  side of the depthwise convolution of x, odd

    Raises ValueError on heads that do not divide dim or an even lepe_kernel.
    Source: BiFormer, arXiv 2303.08810.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        lepe_kernel: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("lepe_kernel", lepe_kernel)
        if lepe_kernel % 2 == 0:
            raise ValueError(f"lepe_kernel is {lepe_kernel}, must be odd")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.lepe = nn.Conv2d(
            dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, device=device, dtype=dtype
        )
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        y = attention(query, key, value).transpose(1, 2).flatten(2)
        y = self.proj(y + self.lepe(x).flatten(2).transpose(1, 2))
        return y.transpose(1, 2).unflatten(2, x.shape[2:])
