"""SpectFormer: filters in the Fourier domain in the early layers, attention in the late ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_stages
from heedful.mixers.grid.spectformer import SpectralGating
from heedful.models import deit
from heedful.models.backbone import Backbone, head
from heedful.models.parts import LayerNorm2d, drop_path_rates, init_linear, resize_table
from heedful.models.spectformer_blocks import ClassBlock, HierarchicalBlock, MapAttention, SpectralBlock
from heedful.registry import register

CONFIGS = {
    "spectformer_tiny": {
        "object": "SpectFormer",
        "parameters": 9_158_376,
        "arguments": {"dim": 256, "heads": 4},
    },
    "spectformer_xsmall": {"object": "SpectFormer", "parameters": 20_028_520, "arguments": {}},
    "spectformer_small": {"object": "SpectFormer", "parameters": 32_449_768, "arguments": {"depth": 19}},
    # The authors write 6 heads, which do not divide 512.
    "spectformer_base": {
        "object": "SpectFormer",
        "parameters": 57_159_656,
        "arguments": {"dim": 512, "depth": 19, "heads": 8},
    },
    # The published multiply-adds leave out the products of attention (without them 3.91, 6.31 and 12.7 G);
    # with them, counted as everywhere, they are 4.07, 6.61 and 13.2 G.
    "spectformer_h_small": {
        "object": "HierarchicalSpectFormer",
        "parameters": 22_226_928,
        "flops": "3.9G",
        "arguments": {},
    },
    "spectformer_h_base": {
        "object": "HierarchicalSpectFormer",
        "parameters": 33_052_880,
        "flops": "6.3G",
        "arguments": {
            "depths": (3, 4, 12, 3),
            "dims": (64, 128, 320, 512),
            "heads": (2, 4, 10, 16),
            "stem": 64,
        },
    },
    "spectformer_h_large": {
        "object": "HierarchicalSpectFormer",
        "parameters": 54_675_792,
        "flops": "12.7G",
        "arguments": {
            "depths": (3, 6, 18, 3),
            "dims": (96, 192, 384, 512),
            "heads": (3, 6, 12, 16),
            "stem": 64,
        },
    },
}


@register("spectformer-backbone", kind="model", paper="spectformer", tags=("image", "spectral"))
class SpectFormer(Backbone):
    """The columnar form: patches with learned positions, filters in the first blocks, attention in the rest.

        filter block:     x += mlp(LN(filter(LN(x))))
        attention block:  x += attention(LN(x));   x += mlp(LN(x))

    The head sees the mean of the normalised tokens; `features` gives one map. Images that the patches do not
    divide are padded with zeros (right, bottom); positions and filters are interpolated to other sizes.

    classes, in_channels, features_only  see `Backbone`
    dim         channels
    depth       blocks
    filters     blocks, from the first, that filter
    heads       of the attention
    image_size  side of the images trained on
    patch       side of a patch, in pixels
    mlp_ratio   width of the MLP, in dims
    drop_path   rate of stochastic depth in the last block, growing from 0

    Source: SpectFormer, arXiv 2304.06446.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "dim": 12,
        "depth": 3,
        "filters": 2,
        "heads": 2,
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
        filters: int = 4,
        heads: int = 6,
        image_size: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_divides("patch", patch, "image_size", image_size)
        self.channels, self.reductions = (dim,), (patch,)
        self.patch, self.side = patch, image_size // patch
        self.embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros(1, self.side**2, dim))
        (rates,) = drop_path_rates((depth,), drop_path)
        size, hidden = (self.side, self.side), int(mlp_ratio * dim)
        self.filters = nn.Sequential(
            *(SpectralBlock(dim, size=size, hidden=hidden, drop_path=rate) for rate in rates[:filters])
        )
        self.blocks = nn.ModuleList(
            deit.Block(dim, deit.DenseAttention(dim, heads=heads), hidden, rate) for rate in rates[filters:]
        )
        if not features_only:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.head = head(dim, classes)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        x = self.embed(F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch)))
        size = (x.shape[2], x.shape[3])
        positions = resize_table(self.positions, (self.side, self.side), size)
        x = self.filters(x + positions.mT.unflatten(2, size))
        tokens = x.flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens, size)
        return [tokens.mT.unflatten(2, size)]

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        return self.norm(last.flatten(2).mT).mean(1)


@register(
    "spectformer-hierarchical-backbone",
    kind="model",
    paper="spectformer",
    tags=("image", "spectral"),
    aliases=("spectformer-h-backbone",),
)
class HierarchicalSpectFormer(Backbone):
    """The hierarchical form: two stages of filters, two of attention, and a class token behind them.

        block:  x += mixer(LN(x));   x += fc2(gelu(DWConv3x3(fc1(LN(x)))))

    A stem of four convolutions and a strided convolution before each further stage halve the map; a norm
    ends the first three stages. The mean of the last map becomes a class token that attends once to itself
    and the map. A second head votes in each token, and logits = head(class) + max over tokens of votes / 2.

    classes, in_channels, features_only  see `Backbone`
    depths        blocks of each stage
    dims          channels of each stage
    heads         of the attention in each stage; the first two stages have none
    mlp_ratios    width of the MLP in each stage, in dims
    stem          channels inside the stem
    token_labels  whether there is the second head
    image_size    side of the images trained on; filters are interpolated to others
    drop_path     rate of stochastic depth in the last block, growing from 0

    Source: SpectFormer, arXiv 2304.06446.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "heads": (1, 1, 2, 2),
        "mlp_ratios": (2, 2, 2, 2),
        "stem": 4,
        "image_size": 64,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 320, 448),
        heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        stem: int = 32,
        token_labels: bool = True,
        image_size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims, heads=heads, mlp_ratios=mlp_ratios)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        self.token_labels = token_labels
        self.downsample = nn.ModuleList([_stem(in_channels, stem, dims[0])])
        self.downsample.extend(nn.Sequential(*_halve(a, b)) for a, b in pairwise(dims))
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            side = -(-image_size // self.reductions[stage])
            blocks = nn.Sequential()
            for rate in rates[stage]:
                mixer = (
                    SpectralGating(dim, size=(side, side))
                    if stage < 2
                    else MapAttention(dim, heads=heads[stage])
                )
                hidden = int(mlp_ratios[stage] * dim)
                blocks.append(HierarchicalBlock(dim, mixer, hidden=hidden, drop_path=rate))
            self.stages.append(blocks)
        self.norms = nn.ModuleList([*(LayerNorm2d(dim, eps=1e-6) for dim in dims[:3]), nn.Identity()])
        if not features_only:
            hidden = int(mlp_ratios[-1] * dims[-1])
            self.class_block = ClassBlock(dims[-1], heads=heads[-1], hidden=hidden)
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
            self.head = head(dims[-1], classes)
            self.token_head = head(dims[-1], classes if token_labels else 0)
        self.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        for downsample, stage, norm in zip(self.downsample, self.stages, self.norms, strict=True):
            x = norm(stage(downsample(x)))
            maps.append(x)
        return maps

    def tokens(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n c"]:
        """The class token and those of the last map, normalised."""
        x = last.flatten(2).mT
        return self.norm(self.class_block(torch.cat([x.mean(1, keepdim=True), x], dim=1)))

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        return self.tokens(last)[:, 0]

    def forward(self, x: Float[Tensor, "b c height width"]) -> Tensor | list[Tensor]:
        if self.features_only or not self.token_labels or not self.classes:
            return super().forward(x)
        check_map("x", x, self.in_channels, (2,))
        tokens = self.tokens(self.features(x)[-1])
        return self.head(tokens[:, 0]) + 0.5 * self.token_head(tokens[:, 1:]).amax(1)

    def reset_classifier(self, classes: int) -> None:
        super().reset_classifier(classes)
        like = next(self.parameters())
        self.token_head = head(self.width, classes if self.token_labels else 0).to(like.device, like.dtype)


def _halve(dim: int, out: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(dim, out, 3, stride=2, padding=1), LayerNorm2d(out)


def _stem(dim: int, width: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for kernel, stride in ((7, 2), (3, 1), (3, 1)):
        conv = nn.Conv2d(dim, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        dim = width
    return nn.Sequential(*layers, *_halve(width, out))


def _init(module: nn.Module) -> None:
    """Linear maps, 1 x 1 convolutions among them, as everywhere; convolutions by what leaves them."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        if module.kernel_size == (1, 1):
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            taps = math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=(2 * module.groups / (taps * module.out_channels)) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
