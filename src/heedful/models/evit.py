"""EViT: DeiT that drops or fuses, layer by layer, the patches to which its class token does not attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides
from heedful.models.deit import DeiT
from heedful.ops.attention import attention
from heedful.registry import register
from heedful.routing.evit import TokenReorganizer, follow_places

CONFIGS = {
    "evit_small_90": {"parameters": 22_050_664, "flops": "4.0G", "arguments": {"keep_rate": 0.9}},
    "evit_small_80": {"parameters": 22_050_664, "flops": "3.5G", "arguments": {"keep_rate": 0.8}},
    "evit_small_70": {"parameters": 22_050_664, "flops": "3.0G", "arguments": {}},
    "evit_small_60": {"parameters": 22_050_664, "flops": "2.6G", "arguments": {"keep_rate": 0.6}},
    "evit_small_50": {"parameters": 22_050_664, "flops": "2.3G", "arguments": {"keep_rate": 0.5}},
}


@register("evit-backbone", kind="model", paper="evit", tags=("image", "token reduction"))
class EViT(DeiT):
    """Vision transformer of patches that go on with the ones that matter to the class token.

        block:  x += attention(LN(x));   x = reorganised(x), in some layers;   x += mlp(LN(x))

    Reorganisation: see `TokenReorganizer`. With keep_rate 1 this is DeiT. In `features` every place of the
    map has the token that stands for it at the end: its own, or the extra one that took it in; zeros where
    it was dropped.

    classes, in_channels, features_only  see `Backbone`
    dim, depth, image_size, patch, mlp_ratio, drop_path  see `DeiT`
    heads      of each block
    keep_rate  share of the patches that stay, one for all or one for each of `layers`
    layers     numbers of the blocks that reorganise, counted from 0
    fuse       the patches that go become one extra token; else they are gone

    Source: EViT, arXiv 2202.07800.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "dim": 12,
        "depth": 3,
        "heads": 3,
        "keep_rate": 0.6,
        "layers": (0, 1),
        "image_size": 48,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        keep_rate: float | Sequence[float] = 0.7,
        layers: Sequence[int] = (3, 6, 9),
        fuse: bool = True,
        image_size: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        rates = [keep_rate] * len(layers) if isinstance(keep_rate, int | float) else list(keep_rate)
        if len(rates) != len(layers):
            raise ValueError(f"keep_rate is {keep_rate!r}, must be one number, or one for each of layers")
        if any(not 0 <= layer < depth for layer in layers):
            raise ValueError(f"layers is {tuple(layers)}, must be of 0 to {depth - 1}, the blocks")
        super().__init__(
            lambda _: ClassWatchingAttention(dim, heads=heads),
            classes=classes,
            in_channels=in_channels,
            features_only=features_only,
            dim=dim,
            depth=depth,
            image_size=image_size,
            patch=patch,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )
        self.layers, self.fuse = tuple(layers), fuse
        of = dict(zip(layers, rates, strict=True))
        self.reorganizers = nn.ModuleList(
            TokenReorganizer(keep_rate=of.get(layer, 1.0), fuse=fuse) for layer in range(depth)
        )

    def set_keep_rate(self, rate: float) -> None:
        """Another share of the patches to keep, in all layers that reorganise: to anneal it in training."""
        for layer in self.layers:
            self.reorganizers[layer].keep_rate = rate  # type: ignore[assignment]  # a TokenReorganizer

    def kept(self, x: Float[Tensor, "b c height width"]) -> list[Int[Tensor, "b keep"]]:
        """The patches that each layer keeps, best first, numbered among those that it sees."""
        return self._through(x)[3]

    def tokens(self, x: Float[Tensor, "b c height width"]) -> tuple[Float[Tensor, "b n e"], tuple[int, int]]:
        """The tokens left after the last block, class token first, and the size of the map."""
        tokens, size, _, _ = self._through(x)
        return tokens, size

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        tokens, size, place, _ = self._through(x)
        tokens = F.pad(tokens[:, 1:], (0, 0, 0, 1))  # the last one stands for what was dropped
        index = torch.where(place < 0, tokens.shape[1] - 1, place)
        tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
        return [tokens.transpose(1, 2).unflatten(2, size)]

    def _through(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Tensor, list[Tensor]]:
        """The tokens left, the size of the map, the token that stands for each place, and who was kept."""
        x, size = self.embedded(x)
        place = torch.arange(x.shape[1] - 1, device=x.device).expand(len(x), -1)
        kept = []
        for block, reorganizer in zip(self.blocks, self.reorganizers, strict=True):
            patches = x.shape[1] - 1
            x, index = reorganising(block, x, reorganizer)
            if index is not None:
                place = follow_places(place, index, patches, fused=self.fuse)
                kept.append(index)
        return x, size, place, kept


def reorganising(
    block: Any, x: Float[Tensor, "b n c"], reorganizer: nn.Module
) -> tuple[Float[Tensor, "b m c"], Int[Tensor, "b keep"] | None]:
    """What a `Block` with a `ClassWatchingAttention` gives that chooses before its MLP, and its choice."""
    y, class_attention = block.mixer(block.norm1(x))
    x, index = reorganizer(x + block.drop_path(y), class_attention)
    return x + block.drop_path(block.mlp(block.norm2(x))), index


class ClassWatchingAttention(nn.Module):
    """Softmax attention of all tokens, and that of the class token to the others in the mean over heads."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b patches"]]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = rearrange(attention(q, k, v), "b h n d -> b n (h d)")
        row = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj(y), row[:, :, 0, 1:].mean(1)
