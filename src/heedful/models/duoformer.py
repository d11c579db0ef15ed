"""DuoFormer: attention among the scales under each cell of a pyramid, then among the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map
from heedful.models.backbone import head
from heedful.models.deit import Block, DenseAttention
from heedful.models.parts import drop_path_rates, init_linear, resize_table
from heedful.registry import register


@register("duoformer", kind="model", paper="duoformer", tags=("image", "pyramid", "local"))
class DuoFormer(nn.Module):
    """Logits from the maps of a pyramid whose sides double, by `MultiscaleFormer`.

        tokens of a cell = [scale token, W_0 coarsest, its 4, 16, 64 ... places on the finer maps, W_i each]

    dims            channels of the maps, coarsest last; the coarsest map has the cells
    classes         outputs of the head; 0: the class token comes out
    dim, depth, heads, mlp_ratio, side, patch_residual, drop_path  see `MultiscaleFormer`

    forward: maps (b, dims[i], height, width) as `features_only=True` of a backbone gives them, finest first,
    each of twice the side of the next. Raises ValueError for other maps. Source: DuoFormer, arXiv 2506.12982.
    """

    example: ClassVar[dict[str, Any]] = {
        "dims": (6, 4, 8),
        "classes": 5,
        "dim": 12,
        "depth": 2,
        "heads": 3,
        "side": 2,
    }

    def __init__(
        self,
        *,
        dims: Sequence[int] = (1024, 2048),
        classes: int = 1000,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4,
        side: int = 7,
        patch_residual: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not dims:
            raise ValueError("dims is empty, must name the channels of at least 1 map")
        self.dims, self.side = tuple(dims), side
        self.projections = nn.ModuleList(nn.Conv2d(channels, dim, 1) for channels in dims)
        for conv in self.projections:
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
            nn.init.normal_(conv.bias, std=1e-6)  # type: ignore[arg-type]
        self.scale_token = nn.Parameter(torch.empty(1, 1, 1, dim))
        nn.init.normal_(self.scale_token, std=0.036)
        self.former = MultiscaleFormer(
            dim,
            scales=len(dims),
            classes=classes,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            side=side,
            patch_residual=patch_residual,
            drop_path=drop_path,
        )

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "b classes"]:
        if len(maps) != len(self.dims):
            raise ValueError(f"maps has {len(maps)} maps, must have {len(self.dims)}")
        for map_, channels in zip(maps, self.dims, strict=True):
            check_map("maps", map_, channels, (2,))
        size = (maps[-1].shape[2], maps[-1].shape[3])
        for finer, map_ in enumerate(reversed(maps)):
            if map_.shape[2:] != (size[0] * 2**finer, size[1] * 2**finer):
                raise ValueError(f"maps has one of {tuple(map_.shape)}, must have sides that double")
        tokens = cells([conv(map_) for conv, map_ in zip(self.projections, maps, strict=True)])
        first = self.scale_token.expand(*tokens.shape[:2], -1, -1)
        return self.former(torch.cat([first, tokens], dim=2), size)

    def example_inputs(self, *, batch: int = 2) -> dict[str, list[Tensor]]:
        """Keyword arguments for a small `forward` call."""
        sides = [self.side * 2**finer for finer in reversed(range(len(self.dims)))]
        return {"maps": [torch.randn(batch, c, s, s) for c, s in zip(self.dims, sides, strict=True)]}


def cells(maps: Sequence[Float[Tensor, "b c _ _"]]) -> Float[Tensor, "b cells t c"]:
    """For each place of the last map what lies there on all maps, coarsest first.

    The 2 x 2 of the second map go column by column, those of finer maps row by row, as the authors have it.
    """
    rows, columns = maps[-1].shape[2:]
    parts = []
    for finer, map_ in enumerate(reversed(maps)):
        order = "v u" if finer == 1 else "u v"
        parts.append(rearrange(map_, f"b c (i u) (j v) -> b (i j) ({order}) c", i=rows, j=columns))
    return torch.cat(parts, dim=2)


class MultiscaleFormer(nn.Module):
    """Attention inside each cell, then attention of the first tokens of all cells and a class token.

        tokens of each cell += P_scale;   scale blocks on every cell alone:  x += MHSA(LN(x)), x += mlp(LN(x))
        y = [class token, first token of each cell] + P;   patch blocks:  y = MHSA(y)

    The head sees the class token as it is.

    dim             channels
    scales          maps of the pyramid: a cell has 1 + 1 + 4 + 16 + ... tokens, the scale token first
    classes         outputs of the head
    depth           scale blocks, and patch blocks
    heads           of all of them
    mlp_ratio       width of the MLPs, in dims
    side            side of the square of cells trained on; P is interpolated for other maps
    patch_residual  y += MHSA(y) in the patch blocks: without it, as published, deep ones degenerate
    drop_path       rate of stochastic depth in the last scale block, growing from 0
    """

    def __init__(
        self,
        dim: int,
        *,
        scales: int,
        classes: int,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4,
        side: int = 7,
        patch_residual: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.side, self.patch_residual = side, patch_residual
        tokens = 1 + sum(4**finer for finer in range(scales))
        self.scale_positions = nn.Parameter(torch.empty(1, 1, tokens, dim))
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + side * side, dim))
        (rates,) = drop_path_rates((depth,), drop_path)
        self.scale_blocks = nn.ModuleList(
            Block(dim, DenseAttention(dim, heads=heads), int(mlp_ratio * dim), rate) for rate in rates
        )
        self.patch_blocks = nn.ModuleList(DenseAttention(dim, heads=heads) for _ in range(depth))
        self.head = head(dim, classes)
        self.apply(init_linear)
        for table in (self.scale_positions, self.class_token, self.positions):
            nn.init.trunc_normal_(table, std=0.036)

    def forward(
        self, x: Float[Tensor, "b cells t c"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b classes"]:
        """size: height and width of the cells, where they are not as many as trained on."""
        # 1. Scales: every cell is a sequence of its own.
        x = x + self.scale_positions
        inside = x.flatten(0, 1)
        for block in self.scale_blocks:
            inside = block(inside)
        # 2. Patches: the first token of each cell.
        y = inside[:, 0].unflatten(0, x.shape[:2])
        size = (self.side, self.side) if size is None else size
        grid = resize_table(self.positions[:, 1:], (self.side, self.side), size)
        y = torch.cat([self.class_token.expand(len(y), -1, -1), y], dim=1)
        y = y + torch.cat([self.positions[:, :1], grid], dim=1)
        for attention in self.patch_blocks:
            y = y + attention(y) if self.patch_residual else attention(y)
        return self.head(y[:, 0])
