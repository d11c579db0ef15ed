"""MALA, magnitude-aware linear attention: the length of a query sharpens its weights."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from heedful.mixers.grid.rala import RankAugmentedLinearAttention, elu_features
from heedful.ops.linear import linear_attention
from heedful.ops.rotary import rotate
from heedful.registry import register

_EPS = 1e-6


@register(
    "mala",
    kind="grid",
    paper="mala",
    tags=("linear",),
    aliases=("magnitude-aware-linear-attention",),
    spatial=(2,),
    complexity="O(N C^2 / heads)",
)
class MagnitudeAwareLinearAttention(RankAugmentedLinearAttention):
    """Linear attention whose weights are an affine function of the products, not a quotient.

        q, k, v, o = W x,   y = W_o ((mala_attention(elu(q) + 1, elu(k) + 1, v) + DWConv5x5(v)) * o)

    Projection, rotation, convolution and gate, and so arguments, errors and names of weights, are those
    of `RankAugmentedLinearAttention`. Source: MALA, arXiv 2507.00698.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        return mala_attention(elu_features(q), elu_features(k), v, angles=angles)


def mala_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    *,
    angles: Float[Tensor, "n pairs"] | None = None,
) -> Float[Tensor, "b h n e"]:
    """Linear attention with weights that sum to 1 by an offset; they can be negative.

        s_ij = q_i . k_j / (m sqrt(d)),   S_i = sum_j s_ij
        y_i = sum_j ((1 + 1 / (S_i + eps)) s_ij - S_i / m) v_j,   eps = 1e-6

    A query a times as long has the weights s / S + a (s - S / m).

    query, key  features, not negative
    angles      turn the queries and keys of s, the same for both (then n = m), but not those of S, so that
                the weights sum to 1 only without; None: no rotation

    The result has the dtype of query. Source: MALA, arXiv 2507.00698.
    """
    m, scale = key.shape[2], query.shape[-1] ** -0.5
    # 3. A product with one vector is a sum, not a matrix product, which autocast would round.
    total = scale * (query * key.mean(2, keepdim=True)).sum(-1, keepdim=True)
    if angles is not None:
        query, key = (rotate(t, angles, pairing="interleaved") for t in (query, key))  # 4
    read = linear_attention(query, key * (scale / m), value, causal=False)  # 5
    mean = value.to(query.dtype).mean(2, keepdim=True)
    return read * (1 + 1 / (total + _EPS)) - total * mean  # type: ignore[operator]  # 6
