"""EfficientViT: three stages on a sixteenth of the image's side, with cascaded group attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive, check_stages
from heedful.mixers.grid.efficientvit_cga import CascadedGroupAttention
from heedful.models.backbone import Backbone, head
from heedful.models.conv_parts import ConvFFN, Residual, depthwise, merge, stem16
from heedful.models.parts import drop_path_rates
from heedful.registry import register

CONFIGS = {
    "efficientvit_m0": {"parameters": 2_349_436, "flops": "79M", "arguments": {"dims": (64, 128, 192)}},
    "efficientvit_m1": {
        "parameters": 2_980_560,
        "flops": "167M",
        "arguments": {"dims": (128, 144, 192), "heads": (2, 3, 3), "kernels": (7, 5, 3, 3)},
    },
    "efficientvit_m2": {
        "parameters": 4_187_554,
        "flops": "201M",
        "arguments": {"dims": (128, 192, 224), "heads": (4, 3, 2), "kernels": (7, 5, 3, 3)},
    },
    "efficientvit_m3": {
        "parameters": 6_900_722,
        "flops": "263M",
        "arguments": {"dims": (128, 240, 320), "heads": (4, 3, 4)},
    },
    "efficientvit_m4": {
        "parameters": 8_804_228,
        "flops": "299M",
        "arguments": {"dims": (128, 256, 384), "kernels": (7, 5, 3, 3)},
    },
    "efficientvit_m5": {
        "parameters": 12_473_772,
        "flops": "522M",
        "arguments": {
            "depths": (1, 3, 4),
            "dims": (192, 288, 384),
            "heads": (3, 3, 4),
            "kernels": (7, 5, 3, 3),
        },
    },
}


@register(
    "efficientvit-cga-backbone",
    kind="model",
    paper="efficientvit-cga",
    tags=("image", "window", "mobile"),
)
class EfficientViT(Backbone):
    """Image backbone for devices: attention in a cascade of heads, between convolutions and FFNs.

        block:  x += BN(DWConv3x3(x));  x += ffn(x);  x += attention(x);  x += BN(DWConv3x3(x));  x += ffn(x)

    The pooled vector goes through a batch norm to the head.

    classes, in_channels, features_only  see `Backbone`
    depths      blocks of each stage
    dims        channels of each stage; the first is a multiple of 8
    heads       heads of each stage, divisors of dims
    key_dim     width of queries and keys of a head
    kernels     side of the convolution of queries, one a head; further ones are not used
    window      side of a window, or the whole map where that is smaller
    image_size  side of the images that the tables of biases are for; larger maps are cut into windows
    drop_path   rate of stochastic depth in the last block, growing from 0; the authors have none

    Source: EfficientViT, arXiv 2305.07027.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1),
        "dims": (8, 12, 16),
        "heads": (2, 3, 2),
        "key_dim": 4,
        "window": 5,
        "image_size": 128,
    }
    example_size: ClassVar[tuple[int, int]] = (128, 128)

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (1, 2, 3),
        dims: Sequence[int] = (64, 128, 192),
        heads: Sequence[int] = (4, 4, 4),
        key_dim: int = 16,
        kernels: Sequence[int] = (5, 5, 5, 5),
        window: int = 7,
        image_size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_positive("image_size", image_size)
        check_stages(len(dims), depths=depths, heads=heads)
        if dims[0] % 8:
            raise ValueError(f"dims is {tuple(dims)}, must start with a multiple of 8")
        self.channels, self.reductions = tuple(dims), tuple(16 * 2**stage for stage in range(len(dims)))
        self.stem = stem16(in_channels, dims[0])
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, (dim, reduction) in enumerate(zip(dims, self.reductions, strict=True)):
            parts = merge(dims[stage - 1], dim) if stage else []
            for rate in rates[stage]:
                mixer = CascadedGroupAttention(
                    dim,
                    heads=heads[stage],
                    key_dim=key_dim,
                    window=min(window, -(-image_size // reduction)),
                    kernels=kernels,
                )
                parts.append(Block(dim, mixer, rate))
            self.stages.append(nn.Sequential(*parts))
        if not features_only:
            self.norm = nn.BatchNorm1d(dims[-1])
            self.head = head(dims[-1], classes)
            self.head.apply(_init)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pool(self, last: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        return self.norm(last.mean((2, 3)))


class Block(nn.Sequential):
    """A mixer between two pairs of convolution and FFN, each with its residual."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.dw0 = depthwise(dim, drop_path)
        self.ffn0 = Residual(ConvFFN(dim), drop_path)
        self.mixer = Residual(mixer, drop_path)
        self.dw1 = depthwise(dim, drop_path)
        self.ffn1 = Residual(ConvFFN(dim), drop_path)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
