"""The blocks of SpectFormer: one residual around filter and MLP, or two, and attention of a class token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.mixers.grid.spectformer import SpectralGating
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.models.parts import DropPath, LayerNorm2d, Mlp


class SpectralBlock(nn.Module):
    """x + mlp(LN(filter(LN(x)))) on a map: a single residual, as in the columnar SpectFormer.

    size  (height, width) of the map;  hidden  width of the MLP;  eps  of the norms
    Source: SpectFormer, arXiv 2304.06446.
    """

    def __init__(
        self, dim: int, *, size: tuple[int, int], hidden: int, eps: float = 1e-6, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=eps)
        self.filter = SpectralGating(dim, size=size)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        y = self.filter(self.norm1(x)).movedim(1, -1)
        return x + self.drop_path(self.mlp(self.norm2(y)).movedim(-1, 1))


class MapAttention(nn.Module):
    """Softmax attention of all tokens of a map."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads=heads)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        y = self.attention(rearrange(x, "b c y x -> b (y x) c"))
        return rearrange(y, "b (y x) c -> b c y x", y=x.shape[2])


class HierarchicalBlock(nn.Module):
    """x += mixer(LN(x));  x += fc2(gelu(DWConv3x3(fc1(LN(x))))), as in the hierarchical SpectFormer.

    mixer  of maps: `SpectralGating` in the early stages, `MapAttention` in the late ones
    Source: SpectFormer, arXiv 2304.06446.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, *, hidden: int, eps: float = 1e-6, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=eps)
        self.mixer = mixer
        self.norm2 = LayerNorm2d(dim, eps=eps)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.fc2(F.gelu(self.dwconv(self.fc1(self.norm2(x))))))


class ClassBlock(nn.Module):
    """The first token attends to all and goes through an MLP; the others stay as they are.

    Source: SpectFormer, arXiv 2304.06446.
    """

    def __init__(self, dim: int, *, heads: int, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = SelfAttention(dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        first, rest = x[:, :1], x[:, 1:]
        seen = self.norm1(x)
        first = first + self.attention(seen[:, :1], context=seen)
        return torch.cat([first + self.mlp(self.norm2(first)), rest], dim=1)
