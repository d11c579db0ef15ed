"""Sparsifiner's attention: of each patch to the few keys that a predictor estimates to matter."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_tokens
from heedful.ops.attention import attention
from heedful.routing.connectivity import ConnectivityPredictor


class SparsifinerAttention(nn.Module):
    """Softmax attention of a class token to all tokens, and of each patch to its predicted keys.

        y_i = W sum_j softmax_j(d^-1/2 q_i . k_j) v_j,   j in the keys picked for i (`ConnectivityPredictor`)

    Takes tokens (b, 1 + height * width, c), class token first. The choice passes no gradient: the predictor
    learns from `dense`, where attention is complete and stands beside its estimate.

    dim         channels
    heads       divides dim
    size        height and width of the map that the predictor is made for
    keep_rate   share of the keys that a patch keeps, rounded up
    reduce_tokens, reduce_dim, coefficients, basis_threshold, predictor_scale  see `ConnectivityPredictor`
    qkv_bias    whether the projection of queries, keys and values has a bias

    Raises ValueError if heads do not divide, and as `ConnectivityPredictor` does.
    Source: Sparsifiner, arXiv 2303.13755.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 6,
        size: tuple[int, int] = (14, 14),
        keep_rate: float = 0.25,
        reduce_tokens: int = 6,
        reduce_dim: int = 2,
        coefficients: int = 8,
        basis_threshold: float = 0.02,
        predictor_scale: float | None = None,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        self.dim, self.heads, self.size = dim, heads, size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.predictor = ConnectivityPredictor(
            dim // heads,
            1 + size[0] * size[1],
            heads=heads,
            keep_rate=keep_rate,
            reduce_tokens=reduce_tokens,
            reduce_dim=reduce_dim,
            coefficients=coefficients,
            basis_threshold=basis_threshold,
            predictor_scale=predictor_scale,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        size: tuple[int, int] | None = None,
        active: Bool[Tensor, "b patches"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """size: height and width of the map, where not as declared; active: patches that are not pruned."""
        query, key, value = self.heads_of(x, active)
        seen = self.predictor(query, key, active=active, size=self._other(size))
        return self.join(attention(query, key, value, pattern=seen))

    def dense(
        self, x: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b h patches n"], Float[Tensor, "b h n n"]]:
        """Complete attention, what the predictor estimates for the patches, and the weights themselves."""
        query, key, value = self.heads_of(x)
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return self.join(weights @ value), self.predictor.reconstruction(query, key), weights

    def heads_of(
        self, x: Float[Tensor, "b n c"], active: Bool[Tensor, "b patches"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Queries, keys and values, those of pruned patches zero."""
        check_tokens("x", x, self.dim)
        query, key, value = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads
        ).unbind(0)
        if active is not None:
            live = torch.cat([active.new_ones(len(x), 1), active], dim=1)[:, None, :, None]
            query, key, value = (y * live for y in (query, key, value))
        return query, key, value

    def join(self, heads: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
        """The heads side by side, projected."""
        return self.proj(rearrange(heads, "b h n d -> b n (h d)"))

    def _other(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return None if size == self.size else size
