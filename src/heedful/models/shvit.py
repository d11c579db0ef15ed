"""SHViT: three stages on a sixteenth of the image's side, the last two with single-head attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.shvit import SingleHeadPartialAttention
from heedful.models.backbone import Backbone, head
from heedful.models.conv_parts import ConvFFN, Residual, depthwise, merge, stem16
from heedful.models.parts import drop_path_rates
from heedful.registry import register

CONFIGS = {
    "shvit_s1": {
        "parameters": 6_330_808,
        "flops": "241M",
        "arguments": {"depths": (2, 4, 5), "dims": (128, 224, 320), "partial_dims": (0, 48, 68)},
    },
    "shvit_s2": {
        "parameters": 11_483_072,
        "flops": "366M",
        "arguments": {"depths": (2, 4, 5), "dims": (128, 308, 448), "partial_dims": (0, 66, 96)},
    },
    "shvit_s3": {
        "parameters": 14_245_273,
        "flops": "601M",
        "arguments": {"depths": (3, 5, 5), "dims": (192, 352, 448), "partial_dims": (0, 75, 96)},
    },
    "shvit_s4": {
        "parameters": 16_588_484,
        "flops": "986M",
        "size": 256,
        "arguments": {"depths": (4, 7, 6), "dims": (224, 336, 448), "partial_dims": (0, 72, 96)},
    },
}


@register("shvit-backbone", kind="model", paper="shvit", tags=("image", "dense", "mobile"))
class SHViT(Backbone):
    """Image backbone for devices: large patches, and one head of attention on a part of the channels.

        block:  x += BN(DWConv3x3(x));   x += attention(x);   x += ffn(x)

    A stage with partial_dims of 0 has no attention. The pooled vector goes through a batch norm to the head.

    classes, in_channels, features_only  see `Backbone`
    depths        blocks of each stage
    dims          channels of each stage; the first is a multiple of 8
    partial_dims  channels that attend, in each stage
    qk_dim        width of queries and keys
    drop_path     rate of stochastic depth in the last block, growing from 0; the authors have none

    Source: SHViT, arXiv 2401.16456.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1),
        "dims": (8, 12, 16),
        "partial_dims": (0, 4, 5),
        "qk_dim": 4,
    }
    example_size: ClassVar[tuple[int, int]] = (128, 128)

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 4, 5),
        dims: Sequence[int] = (128, 224, 320),
        partial_dims: Sequence[int] = (0, 48, 68),
        qk_dim: int = 16,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(len(dims), depths=depths, partial_dims=partial_dims)
        if dims[0] % 8:
            raise ValueError(f"dims is {tuple(dims)}, must start with a multiple of 8")
        self.channels, self.reductions = tuple(dims), tuple(16 * 2**stage for stage in range(len(dims)))
        self.stem = stem16(in_channels, dims[0])
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            parts = merge(dims[stage - 1], dim) if stage else []
            for rate in rates[stage]:
                mixer: nn.Module = nn.Identity()
                if partial_dims[stage]:
                    mixer = SingleHeadPartialAttention(dim, partial_dim=partial_dims[stage], qk_dim=qk_dim)
                    nn.init.zeros_(mixer.get_parameter("proj.1.bn.weight"))
                    mixer = Residual(mixer, rate)
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
    """A convolution for positions, a mixer, and an FFN, each with its residual."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.conv = depthwise(dim, drop_path)
        self.mixer = mixer
        self.ffn = Residual(ConvFFN(dim), drop_path)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
