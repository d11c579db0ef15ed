"""BiFormer: four stages of bi-level routing attention, the last one dense."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_stages
from heedful.mixers.grid.attention_lepe import AttentionLePE
from heedful.mixers.grid.biformer import BiLevelRoutingAttention
from heedful.models.backbone import head
from heedful.models.parts import DropPath, Mlp, drop_path_rates
from heedful.models.pyramid import Pyramid
from heedful.registry import register

CONFIGS = {
    "biformer_tiny": {"parameters": 13_142_760, "flops": "2.2G", "arguments": {"depths": (2, 2, 8, 2)}},
    "biformer_small": {"parameters": 25_536_232, "flops": "4.5G", "arguments": {"depths": (4, 4, 18, 4)}},
    "biformer_base": {
        "parameters": 56_804_968,
        "flops": "9.8G",
        "arguments": {"depths": (4, 4, 18, 4), "dims": (96, 192, 384, 768)},
    },
}


@register("biformer-backbone", kind="model", paper="biformer", tags=("image", "sparse", "routing"))
class BiFormer(Pyramid):
    """Image backbone with bi-level routing attention in three stages and dense attention in the last.

        block:  x += DWConv3x3(x);   x += attention(LN(x));   x += mlp(LN(x))

    A stem of two strided convolutions and a strided convolution before each further stage halve the map; the
    last map goes through a batch norm and a mean to the head.

    classes, in_channels, features_only  see `Backbone`
    depths       blocks of each stage
    dims         channels of each stage, multiples of head_dim
    head_dim     width of a head in the routed stages; the dense stage has 8 heads
    topk         regions that a region sees, in each routed stage
    regions      regions along each side of the map
    mlp_ratio    width of the MLP, in dims
    drop_path    rate of stochastic depth in the last block, growing from 0

    Source: BiFormer, arXiv 2303.08810.
    """

    example: ClassVar[dict[str, Any]] = {
        "classes": 10,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "head_dim": 4,
        "topk": (1, 2, 3),
        "regions": 2,
    }

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        head_dim: int = 32,
        topk: Sequence[int] = (1, 4, 16),
        regions: int = 7,
        mlp_ratio: float = 3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        first = dims[0] // 2
        stem = nn.Sequential(*_halve(in_channels, first), nn.GELU(), *_halve(first, dims[0]))
        self.downsample = nn.ModuleList([stem])
        for before, dim in pairwise(dims):
            self.downsample.append(nn.Sequential(*_halve(before, dim)))
        self.stages = nn.ModuleList()
        rates = drop_path_rates(depths, drop_path)
        for stage, dim in enumerate(dims):
            blocks = nn.Sequential()
            for rate in rates[stage]:
                mixer: nn.Module = (
                    BiLevelRoutingAttention(
                        dim, heads=dim // head_dim, regions=regions, topk=topk[stage], lepe_kernel=5
                    )
                    if stage < len(topk)
                    else AttentionLePE(dim)
                )
                blocks.append(Block(dim, mixer, int(mlp_ratio * dim), rate))
            self.stages.append(blocks)
        if not features_only:
            self.norm = nn.BatchNorm2d(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(_init)


class Block(nn.Module):
    """A convolution for positions, a mixer of maps, and an MLP."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.positions = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.positions(x)
        x = x + self.drop_path(self.mixer(self.norm1(x.movedim(1, -1)).movedim(-1, 1)))
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))


def _halve(dim: int, out: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(dim, out, 3, stride=2, padding=1), nn.BatchNorm2d(out)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
