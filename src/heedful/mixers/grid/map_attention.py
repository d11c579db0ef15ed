"""What attention mixers of maps share: projections around a way to attend."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map
from heedful.mixers.mixer import Mixer


class MapAttention(Mixer, ABC):
    """y = W_o attend(W_q x, W_k x, W_v x) on the tokens of a map in row-major order.

    dim       channels
    heads     divides dim
    qkv_bias  whether the projection of queries, keys and values has a bias
    A mixer says how its tokens attend; raises ValueError if heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        qkv_bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    @abstractmethod
    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        size: tuple[int, ...],
    ) -> Float[Tensor, "b h n d"]:
        """Attention of the tokens of a map of this size."""

    def mix(self, x: Float[Tensor, "b n c"], size: tuple[int, ...]) -> Float[Tensor, "b n c"]:
        """The mechanism on tokens."""
        query, key, value = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(self.attend(query, key, value, size), "b h n d -> b n (h d)"))

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size = tuple(x.shape[2:])
        y = self.mix(x.flatten(2).transpose(1, 2), size)
        return y.transpose(1, 2).unflatten(2, size)
