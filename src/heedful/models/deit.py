"""DeiT's frame: patches and a class token with learned positions, through equal blocks with any mixer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides
from heedful.models.backbone import Backbone, head
from heedful.models.parts import DropPath, Mlp, drop_path_rates, init_linear, resize_table
from heedful.ops.attention import attention


class DeiT(Backbone):
    """A class token and the patches of an image; the head sees the class token. `features` gives one map.

        block:  x += mixer(LN(x), size=(height, width));   x += mlp(LN(x))

    Images that the patches do not divide are padded with zeros (right, bottom); learned positions are
    interpolated to maps of another size than that of `image_size`.

    mixer       layer number -> a module that takes tokens, class token first, and the size of the map
    dim         channels
    depth       blocks
    image_size  side of the images trained on
    patch       side of a patch, in pixels
    mlp_ratio   width of the MLP, in dims
    drop_path   rate of stochastic depth in the last block, growing from 0
    """

    def __init__(
        self,
        mixer: Callable[[int], nn.Module],
        *,
        classes: int,
        in_channels: int,
        features_only: bool,
        dim: int,
        depth: int,
        image_size: int,
        patch: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_divides("patch", patch, "image_size", image_size)
        self.channels, self.reductions = (dim,), (patch,)
        self.patch, self.side = patch, image_size // patch
        self.embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        (rates,) = drop_path_rates((depth,), drop_path)
        hidden = int(mlp_ratio * dim)
        self.blocks = nn.ModuleList(Block(dim, mixer(i), hidden, rate) for i, rate in enumerate(rates))
        if not features_only:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.head = head(dim, classes)
        self.apply(init_linear)
        for table in (self.class_token, self.positions):
            nn.init.trunc_normal_(table, std=0.02)

    def embedded(
        self, x: Float[Tensor, "b c height width"]
    ) -> tuple[Float[Tensor, "b n e"], tuple[int, int]]:
        """The class token and the patches before the first block, and the size of the map."""
        x = self.embed(F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch)))
        size = (x.shape[2], x.shape[3])
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        first, grid = self.positions[:, :1], self.positions[:, 1:]
        return x + torch.cat([first, resize_table(grid, (self.side, self.side), size)], dim=1), size

    def tokens(self, x: Float[Tensor, "b c height width"]) -> tuple[Float[Tensor, "b n e"], tuple[int, int]]:
        """The same after the last block."""
        x, size = self.embedded(x)
        for block in self.blocks:
            x = block(x, size)
        return x, size

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        tokens, size = self.tokens(x)
        return [tokens[:, 1:].transpose(1, 2).unflatten(2, size)]

    def pooled(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e"]:
        return self.norm(self.tokens(x)[0][:, 0])


class Block(nn.Module):
    """A mixer of tokens and an MLP, each behind a norm."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "b n c"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.mixer(self.norm1(x), size=size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DenseAttention(nn.Module):
    """Softmax attention of all tokens, where a mixer that knows of the map does not stand."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], *, size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n c"]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = attention(q, k, v)
        assert isinstance(y, Tensor)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))
