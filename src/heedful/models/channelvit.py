"""ChannelViT: a vision transformer that reads every channel of an image by itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.models.backbone import head
from heedful.models.channel_tokens import ChannelPatches, sample_channels, stretch_table
from heedful.models.deit import Block, DenseAttention
from heedful.models.parts import drop_path_rates, init_linear, resize_table
from heedful.registry import register

# Without a head, as released; the names say the width, the patch and the number of channels.
CONFIGS = {
    "channelvit_tiny_p16_c3": {"parameters": 5_426_688, "arguments": {"dim": 192, "heads": 3}},
    "channelvit_tiny_p8_c8": {
        "parameters": 5_503_680,
        "arguments": {"dim": 192, "heads": 3, "patch": 8, "in_channels": 8},
    },
    "channelvit_small_p16_c3": {"parameters": 21_470_208, "arguments": {}},
    "channelvit_small_p8_c5": {"parameters": 21_623_040, "arguments": {"patch": 8, "in_channels": 5}},
    "channelvit_small_p8_c8": {"parameters": 21_624_192, "arguments": {"patch": 8, "in_channels": 8}},
    "channelvit_small_p8_c18": {"parameters": 21_628_032, "arguments": {"patch": 8, "in_channels": 18}},
    "channelvit_base_p16_c3": {"parameters": 85_407_744, "arguments": {"dim": 768, "heads": 12}},
    "channelvit_base_p8_c8": {
        "parameters": 85_715_712,
        "arguments": {"dim": 768, "heads": 12, "patch": 8, "in_channels": 8},
    },
}


@register(
    "channelvit",
    kind="model",
    paper="channelvit",
    tags=("image", "channels", "dense"),
    complexity="O((C P)^2)",
)
class ChannelViT(nn.Module):
    """Vision transformer whose tokens are the patches of every channel, any set of known channels in.

        t_cp = W patch_cp + b + channel[id_c] + position_p          for the patches p of every channel c
        block:  x += attention(LN(x));   x += mlp(LN(x))            over the class token and all t_cp
        y = head(LN(x)_class)

    classes          outputs of the head; 0: none, the class token comes out
    in_channels      known channels: identities are 0 .. in_channels - 1
    dim              channels of tokens
    depth            blocks
    heads            of each block
    image_size       side of the images trained on
    patch            side of a patch, in pixels
    mlp_ratio        width of the MLP, in dims
    drop_path        rate of stochastic depth in the last block, growing from 0
    sample_channels  in training every batch keeps a random subset of its channels
    published_positions  the positions are interpolated as published, with a step slightly off, unless the
                     image has one channel and the size trained on; False: only where the size is another,
                     and with the exact step

    forward: x (b, c, height, width) with any number c of channels, and their identities `channels` (b, c) or
    (c); None: 0 .. c - 1. Raises ValueError if heads or the patch do not divide, on wrong shapes, and on
    unknown identities.
    Source: Channel Vision Transformers, arXiv 2309.16108.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "in_channels": 5,
        "dim": 12,
        "depth": 2,
        "heads": 3,
        "image_size": 16,
        "patch": 4,
    }

    def __init__(
        self,
        *,
        classes: int = 0,
        in_channels: int = 3,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        image_size: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        sample_channels: bool = True,
        published_positions: bool = True,
    ) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_divides("patch", patch, "image_size", image_size)
        self.in_channels, self.side = in_channels, image_size // patch
        self.sample_channels, self.published_positions = sample_channels, published_positions
        self.patches = ChannelPatches(dim, patch=patch)
        self.channel_embed = nn.Embedding(in_channels, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim))
        (rates,) = drop_path_rates((depth,), drop_path)
        self.blocks = nn.ModuleList(
            Block(dim, DenseAttention(dim, heads=heads), int(mlp_ratio * dim), rate) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = head(dim, classes)
        self.apply(init_linear)
        for table in (self.class_token, self.positions, self.channel_embed.weight):
            nn.init.trunc_normal_(table, std=0.02)

    def position_table(self, count: int, size: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """Positions of the class token and of `count` channels with size[0] x size[1] patches each."""
        first, grid = self.positions[0].split((1, self.side**2))
        own = (self.side, self.side)
        if not self.published_positions:
            grid = resize_table(grid, own, size)
        elif (count, size) != (1, own):
            grid = stretch_table(grid, self.side, size)
        return torch.cat([first, grid.repeat(count, 1)])[None]

    def embed(
        self, x: Float[Tensor, "b c height width"], channels: Int[Tensor, "b c"] | Int[Tensor, " c"] | None
    ) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """The tokens that enter the first block, class token first, then channel by channel."""
        channels = self._identities(x, channels)
        size = self.patches.size(x)
        # 1. A subset of the channels.
        if self.training and self.sample_channels:
            x, channels = sample_channels(x, channels)
        # 2. Patches of every channel, and whose they are.
        batch, count = channels.shape
        tokens = rearrange(self.patches(x.flatten(0, 1)), "(b c) p d -> b c p d", b=batch)
        tokens = (tokens + self.channel_embed(channels)[:, :, None]).flatten(1, 2)
        # 3. The class token, and where they are.
        tokens = torch.cat([self.class_token.expand(batch, -1, -1), tokens], dim=1)
        return tokens + self.position_table(count, size), size

    def intermediate_layers(
        self,
        x: Float[Tensor, "b c height width"],
        channels: Int[Tensor, "b c"] | Int[Tensor, " c"] | None = None,
        *,
        layers: int = 1,
    ) -> list[Float[Tensor, "b n d"]]:
        """What the last `layers` blocks give, normed: the class token, then channel by channel."""
        tokens, size = self.embed(x, channels)
        outputs = []
        for place, block in enumerate(self.blocks):
            tokens = block(tokens, size)
            if place >= len(self.blocks) - layers:
                outputs.append(self.norm(tokens))
        return outputs

    def forward(
        self,
        x: Float[Tensor, "b c height width"],
        channels: Int[Tensor, "b c"] | Int[Tensor, " c"] | None = None,
    ) -> Float[Tensor, "b k"]:
        (tokens,) = self.intermediate_layers(x, channels)
        return self.head(tokens[:, 0])

    def _identities(self, x: Tensor, channels: Tensor | None) -> Tensor:
        check_map("x", x, None, (2,))
        batch, count = x.shape[:2]
        if not count or (channels is None and count > self.in_channels):
            raise ValueError(f"x has {count} channels, must have 1 to {self.in_channels}, those known")
        if channels is None:
            return torch.arange(count, device=x.device).expand(batch, -1)
        if channels.shape not in ((count,), (batch, count)):
            raise ValueError(
                f"channels has shape {tuple(channels.shape)}, must be ({count},) or ({batch}, {count})"
            )
        if not torch.compiler.is_compiling() and channels.numel():
            low, high = (int(end) for end in channels.aminmax())
            if low < 0 or high >= self.in_channels:
                raise ValueError(f"channels go from {low} to {high}, must be 0 to {self.in_channels - 1}")
        return channels.expand(batch, -1)

    def example_inputs(
        self, *, batch: int = 2, size: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, self.in_channels, *size, generator=generator, dtype=torch.float64)
        return {"x": x.to(dtype), "channels": torch.arange(self.in_channels).expand(batch, -1)}
