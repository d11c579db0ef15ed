"""RALA, rank-augmented linear attention: keys weighted by the mean query, outputs gated by the input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.ops.linear import linear_attention
from heedful.ops.rotary import rotate
from heedful.registry import register

_EPS = 1e-6


@register(
    "rala",
    kind="grid",
    paper="rala",
    tags=("linear",),
    aliases=("rank-augmented-linear-attention",),
    spatial=(2,),
    complexity="O(N C^2 / heads)",
)
class RankAugmentedLinearAttention(Mixer):
    """Linear attention with features elu + 1, whose map of values and whose output gain rank.

        q, k, v, o = W x,   y = W_o ((rala_attention(elu(q) + 1, elu(k) + 1, v) + DWConv5x5(v)) * o)

    Positions enter as a 2-D rotation of queries and keys, in the numerator alone; see `rala_attention`.

    dim    channels
    heads  divides dim and leaves a multiple of 4 channels a head, half for rows and half for columns

    Raises ValueError on heads that do not fit. Source: RALA, arXiv 2411.07635.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        if dim // heads % 4:
            raise ValueError(
                f"heads is {heads}, must leave a multiple of 4 channels a head, not {dim // heads}"
            )
        self.heads = heads
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1, device=device, dtype=dtype)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, device=device, dtype=dtype)
        self.proj = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        height, width = x.shape[2:]
        q, k, v, gate = self.qkvo(x).chunk(4, dim=1)  # 1. The gate has no activation.
        local = self.lepe(v)  # 2
        # Contiguous: the strides of the gradients differ from those that torch.compile plans with otherwise.
        q, k, v = (rearrange(t, "b (h d) y x -> b h (y x) d", h=self.heads).contiguous() for t in (q, k, v))
        angles = grid_angles((height, width), q.shape[-1], like=q)
        y = self._attend(q, k, v, angles)  # 3 to 7
        y = rearrange(y, "b h (y x) d -> b (h d) y x", y=height).to(local.dtype)
        return self.proj((y + local) * gate)  # 8

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        return rala_attention(elu_features(q), elu_features(k), v, angles=angles)


@register(
    "rala-vanilla",
    kind="grid",
    paper="rala",
    tags=("dense",),
    spatial=(2,),
    complexity="O(N^2 C)",
)
class RALAVanillaAttention(RankAugmentedLinearAttention):
    """Softmax attention in the frame of RALA, for the late stages of its backbones.

        q, k, v, o = W x,   y = W_o ((softmax(q_r k_r^T / sqrt(d)) v + DWConv5x5(v)) * o)

    q_r and k_r are turned by their place on the map. Arguments, errors and weights as in
    `RankAugmentedLinearAttention`. Source: RALA, arXiv 2411.07635.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        q, k = (rotate(t, angles, pairing="interleaved") for t in (q, k))
        return attention(q, k, v)  # type: ignore[return-value]


def rala_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    *,
    angles: Float[Tensor, "n pairs"] | None = None,
) -> Float[Tensor, "b h n e"]:
    """Linear attention whose keys count by how much the mean query attends to them.

        alpha_j = m softmax_j(mean_i(q_i) . k_j / sqrt(d))
        y_i = sum_j alpha_j (R_i q_i . R_j k_j) v_j / (sum_j alpha_j q_i . k_j + m eps),   eps = 1e-6

    query, key  features, not negative
    angles      of the rotations R, the same for queries and keys (then n = m); None: no rotation. The
                denominator knows no rotation, so the weights sum to 1 only without.

    The result has the dtype of query. Source: RALA, arXiv 2411.07635.
    """
    m, scale = key.shape[2], query.shape[-1] ** -0.5
    # 4. Products with one vector are sums, not matrix products, which autocast would round.
    logits = scale * (query.mean(2, keepdim=True) * key).sum(-1, keepdim=True)
    key = key * (logits.softmax(2) * m)
    total = (query * key.mean(2, keepdim=True)).sum(-1, keepdim=True) + _EPS  # 6
    if angles is not None:
        query, key = (rotate(t, angles, pairing="interleaved") for t in (query, key))  # 5
    return linear_attention(query, key / m, value, causal=False) / total  # type: ignore[operator, arg-type]  # 7


def elu_features(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """elu(x) + 1, which is positive; float32 at least, as half precision rounds small features to 0."""
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


def grid_angles(size: tuple[int, int], dim: int, *, like: Tensor) -> Float[Tensor, "n pairs"]:
    """Angles of the tokens of a map, row by row: dim / 4 pairs turn with the row, as many with the column.

        angle[i] = 10000 ** -(i / (dim / 4 - 1)),   i < dim / 4

    The slowest pair turns by 1 / 10000, where `heedful.ops.rotary.rotary_angles` ends above it.
    `like` gives the device and, with float32 as the least, the dtype. Source: RALA, arXiv 2411.07635.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    height, width = size
    angle = 10000 ** -torch.linspace(0, 1, dim // 4, device=like.device, dtype=dtype)
    rows = torch.arange(height, device=like.device, dtype=dtype)[:, None, None] * angle
    columns = torch.arange(width, device=like.device, dtype=dtype)[:, None] * angle
    return torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1).flatten(0, 1)
