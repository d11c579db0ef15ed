"""RAT: image restoration by attention inside regions and windows, in the middle of a U-net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.grid.region_attention_transformer import RegionAttention
from heedful.models.parts import ConvMlp, LayerNorm2d
from heedful.ops.attention import attention
from heedful.registry import Entry, register

WINDOW, LAYERS = 4, 3  # sides of a window, layers of a block

CONFIGS = {"rat": {"parameters": 15_945_025, "arguments": {}}}


class WindowAttention(nn.Module):
    """Attention in windows of 4 x 4 pixels, with the scale 1 / sqrt(heads); sides are multiples of 4."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        size = {"b": len(x), "y": x.shape[2] // WINDOW, "p": WINDOW, "q": WINDOW}
        windows = rearrange(x, "b c (y p) (x q) -> (b y x) (p q) c", **size)
        q, k, v = rearrange(self.qkv(windows), "w n (s h d) -> s w h n d", s=3, h=self.heads)
        y = self.proj(rearrange(attention(q, k, v, scale=self.heads**-0.5), "w h n d -> w n (h d)"))
        return rearrange(y, "(b y x) (p q) c -> b c (y p) (x q)", **size).contiguous()


class Layer(nn.Module):
    """x += l_1 regions(LN x);   x += mlp(LN x);   x += l_2 windows(LN x);   x += mlp(LN x);   l from 0."""

    def __init__(self, dim: int, *, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.region_norm, self.region = LayerNorm2d(dim, eps=1e-6), RegionAttention(dim, heads=heads)
        self.region_scale = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.region_mlp_norm, self.region_mlp = LayerNorm2d(dim, eps=1e-6), ConvMlp(dim, hidden)
        self.window_norm, self.window = LayerNorm2d(dim, eps=1e-6), WindowAttention(dim, heads=heads)
        self.window_scale = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.window_mlp_norm, self.window_mlp = LayerNorm2d(dim, eps=1e-6), ConvMlp(dim, hidden)

    def forward(
        self, x: Float[Tensor, "b c height width"], labels: Shaped[Tensor, "b height width"] | None
    ) -> Float[Tensor, "b c height width"]:
        x = x + self.region_scale * self.region(self.region_norm(x), labels=labels)
        x = x + self.region_mlp(self.region_mlp_norm(x))
        x = x + self.window_scale * self.window(self.window_norm(x))
        return x + self.window_mlp(self.window_mlp_norm(x))


class Block(nn.Module):
    """Three layers and a 3 x 3 convolution, added to the input."""

    def __init__(self, dim: int, *, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads=heads, mlp_ratio=mlp_ratio) for _ in range(LAYERS))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c height width"], labels: Shaped[Tensor, "b height width"] | None
    ) -> Float[Tensor, "b c height width"]:
        y = x
        for layer in self.layers:
            y = layer(y, labels)
        return x + self.conv(y)


class NAFBlock(nn.Module):
    """Gates without activations; half(z) is the product of the halves of the channels.

    x += beta conv(s conv(mean(s))),   s = half(DWConv3x3(conv(LN x)));   x += gamma conv(half(conv(LN x)))
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(dim, eps=1e-6), LayerNorm2d(dim, eps=1e-6)
        self.conv1 = nn.Conv2d(dim, 2 * dim, 1)
        self.conv2 = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.attend = nn.Conv2d(dim, dim, 1)
        self.conv3 = nn.Conv2d(dim, dim, 1)
        self.conv4 = nn.Conv2d(dim, 2 * dim, 1)
        self.conv5 = nn.Conv2d(dim, dim, 1)
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        s = _half(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.beta * self.conv3(s * self.attend(s.mean((2, 3), keepdim=True)))
        return x + self.gamma * self.conv5(_half(self.conv4(self.norm2(x))))


@register(
    "region-attention-transformer",
    kind="model",
    paper="region-attention-transformer",
    tags=("image", "restoration", "sparse"),
    aliases=("rat",),
)
class RegionAttentionTransformer(nn.Module):
    """An image in, the restored one out: a U-net of NAF blocks, with region attention at its bottom.

        y = conv(decoders(middle(encoders(conv(x)), labels))) + x

    in_channels  of the image, and of the result
    scale        the image is enlarged bilinearly first
    dim          channels of the first level; they double with every level
    middle       layers at the bottom, a multiple of 3
    encoders, decoders  blocks of each level, finest first and coarsest first
    heads        of both attentions
    mlp_ratio    hidden width of the MLPs over their dim

    forward takes labels (b, height, width), one a pixel of the result, of any kind that can be compared, from
    any segmenter (`heedful.routing.regions.label_map` makes one of masks); None: all is one region. Images of
    any size: below and on the right they are filled up by repeating the border.
    Source: Region Attention Transformer, arXiv 2407.09268.
    """

    entry: ClassVar[Entry]
    example: ClassVar[dict[str, Any]] = {
        "dim": 4,
        "middle": 3,
        "encoders": (1, 1),
        "decoders": (1, 1),
        "heads": 2,
    }

    def __init__(
        self,
        *,
        in_channels: int = 1,
        scale: int = 1,
        dim: int = 64,
        middle: int = 12,
        encoders: Sequence[int] = (2, 2),
        decoders: Sequence[int] = (2, 2),
        heads: int = 8,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("scale", scale), ("middle", middle)):
            check_positive(name, value)
        check_divides("the layers of a block", LAYERS, "middle", middle)
        if len(encoders) != len(decoders):
            raise ValueError(f"decoders is {tuple(decoders)}, must be as long as encoders, {tuple(encoders)}")
        self.in_channels, self.scale = in_channels, scale
        self.intro = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        for depth in encoders:
            self.encoders.append(nn.Sequential(*(NAFBlock(dim) for _ in range(depth))))
            self.downs.append(nn.Conv2d(dim, 2 * dim, 2, stride=2))
            dim *= 2
        self.middle = nn.ModuleList(
            Block(dim, heads=heads, mlp_ratio=mlp_ratio) for _ in range(middle // LAYERS)
        )
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        for depth in decoders:
            self.ups.append(nn.Sequential(nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.PixelShuffle(2)))
            dim //= 2
            self.decoders.append(nn.Sequential(*(NAFBlock(dim) for _ in range(depth))))
        self.ending = nn.Conv2d(dim, in_channels, 3, padding=1)

    def forward(
        self,
        x: Float[Tensor, "b c height width"],
        labels: Shaped[Tensor, "b height2 width2"] | None = None,
    ) -> Float[Tensor, "b c height2 width2"]:
        check_map("x", x, self.in_channels, (2,))
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        (height, width), reduction = x.shape[2:], 2 ** len(self.encoders)
        if labels is not None and labels.shape != (len(x), height, width):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, must be {(len(x), height, width)}, one a pixel"
            )
        unit = reduction * WINDOW
        rows, columns = (
            torch.arange(-(-side // unit) * unit, device=x.device).clamp(max=side - 1)
            for side in (height, width)
        )
        filled = x[:, :, rows[:, None], columns]
        if labels is not None:
            labels = labels[:, rows[::reduction, None], columns[::reduction]]  # the nearest ones

        y, skips = self.intro(filled), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(y))
            y = down(skips[-1])
        bottom = y
        for block in self.middle:
            y = block(y, labels)
        y = y + bottom
        for decoder, up in zip(self.decoders, self.ups, strict=True):
            y = decoder(up(y) + skips.pop())
        return (self.ending(y) + filled)[:, :, :height, :width]

    def example_inputs(
        self, *, batch: int = 2, size: tuple[int, int] = (24, 20), dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        height, width = (side * self.scale for side in size)
        return {
            "x": torch.rand(batch, self.in_channels, *size, generator=generator).to(dtype),
            "labels": torch.randint(0, 3, (batch, height, width), generator=generator),
        }


def focal_region_loss(
    output: Float[Tensor, "b c height width"],
    target: Float[Tensor, "b c height width"],
    labels: Shaped[Tensor, "b height width"],
    *,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """Absolute errors, more where the region of the pixel is restored badly.

        loss = mean(e (1 + beta w)),   e = |output - target|,   w = mean of e over the region / its maximum

    A region is that of one image; the maximum is over the batch; w is a number, and passes no gradient.
    Source: Region Attention Transformer, arXiv 2407.09268.
    """
    error = (output - target).abs()
    image = torch.arange(len(labels), device=labels.device)[:, None]
    label = labels.flatten(1).unique(return_inverse=True)[1]
    region = (image * (label.max() + 1) + label).flatten()
    mean = error.detach().mean(1).flatten()
    total, count = (
        torch.zeros(int(region.max()) + 1, dtype=mean.dtype, device=mean.device).index_add(0, region, t)
        for t in (mean, torch.ones_like(mean))
    )
    worst = (total / count.clamp(min=1)).max().clamp(min=torch.finfo(mean.dtype).tiny)
    weight = ((total / count.clamp(min=1))[region] / worst).clamp(0, 1).view_as(labels)[:, None]
    return (error * (1 + beta * weight)).mean()


def _half(z: Tensor) -> Tensor:
    a, b = z.chunk(2, dim=1)
    return a * b
