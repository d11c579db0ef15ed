"""Single-head self-attention on a part of the channels; the others pass by."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register

SMALL = 1024  # tokens; up to here plain products are faster than the fused operator, which pads q and k


@register(
    "shvit",
    kind="grid",
    paper="shvit",
    tags=("dense", "heads"),
    aliases=("shsa", "single-head-self-attention"),
    spatial=(2,),
    complexity="O(N^2 (qk_dim + partial_dim) + N C^2)",
)
class SingleHeadPartialAttention(Mixer):
    """One head of attention over the first channels, then one projection of all of them.

        x1, x2 = x,   q, k, v = BatchNorm(W GroupNorm(x1))
        y = BatchNorm(W_o relu([softmax(q k^T / sqrt(qk_dim)) v, x2]))

    The GroupNorm has one group: its mean and variance are over the part's channels and the whole map.

    dim          channels
    partial_dim  channels of x1, at most dim; default round(0.214 dim), as in the published models
    qk_dim       width of queries and keys

    Raises ValueError on a partial_dim above dim. Source: SHViT, arXiv 2401.16456.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "partial_dim": 5, "qk_dim": 4}

    def __init__(
        self,
        dim: int,
        *,
        partial_dim: int | None = None,
        qk_dim: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        partial_dim = max(1, round(0.214 * dim)) if partial_dim is None else partial_dim
        check_positive("partial_dim", partial_dim)
        check_positive("qk_dim", qk_dim)
        if partial_dim > dim:
            raise ValueError(f"partial_dim is {partial_dim}, must be at most dim, which is {dim}")
        self.partial_dim = partial_dim
        self.qk_dim = qk_dim
        self.pre_norm = nn.GroupNorm(1, partial_dim, device=device, dtype=dtype)
        self.qkv = _conv_norm(partial_dim, 2 * qk_dim + partial_dim, device=device, dtype=dtype)
        self.proj = nn.Sequential(nn.ReLU(), _conv_norm(dim, dim, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        part, rest = x.split([self.partial_dim, self.dim - self.partial_dim], dim=1)  # 1
        # Cut with the channels in front, so that the gradient comes back contiguous: with a transposed one,
        # the backward of BatchNorm in eval is wrong on a CPU for a single image.
        qkv = self.qkv(self.pre_norm(part)).flatten(2)  # 2, 3
        q, k, v = qkv.split([self.qk_dim, self.qk_dim, self.partial_dim], dim=1)
        mixed = _attend(q, k, v).unflatten(2, x.shape[2:])  # 4
        return self.proj(torch.cat([mixed, rest], dim=1))  # 5


def _attend(
    q: Float[Tensor, "b d n"], k: Float[Tensor, "b d n"], v: Float[Tensor, "b e n"]
) -> Float[Tensor, "b e n"]:
    """softmax(d^-1/2 q^T k), one head."""
    if q.shape[2] > SMALL:
        return attention(*(t.mT[:, None] for t in (q, k, v)))[:, 0].mT  # type: ignore[return-value, index]
    logits = (q * q.shape[1] ** -0.5).mT @ k
    return v @ logits.softmax(-1).mT.to(v.dtype)


def _conv_norm(
    dim: int, out: int, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Sequential:
    """A 1x1 convolution without bias and its BatchNorm."""
    conv = nn.Conv2d(dim, out, 1, bias=False, device=device, dtype=dtype)
    return nn.Sequential(OrderedDict(c=conv, bn=nn.BatchNorm2d(out, device=device, dtype=dtype)))
