"""Swin's frame: four stages of merged patches around any mixer, and its attention in shifted windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides, check_positive, check_stages
from heedful.models.backbone import head
from heedful.models.parts import DropPath, LayerNorm2d, Mlp, init_linear
from heedful.models.pyramid import Pyramid, stages_of
from heedful.ops.attention import attention
from heedful.ops.relative_bias import relative_bias


class Swin(Pyramid):
    """Four stages of equal blocks; the head sees the mean of the last map behind a norm.

        block:  x += mixer(LN(x));   x += mlp(LN(x))

    Maps that patches of 4 x 4, later 2 x 2, do not divide are padded with zeros (right, bottom).

    mixer       (stage, block of the stage, side of its map) -> a module that mixes maps
    depths      blocks of each stage
    dims        channels of each stage
    image_size  side of the images trained on
    mlp_ratio   width of the MLP, in dims
    drop_path   rate of stochastic depth in the last block, growing from 0
    """

    def __init__(
        self,
        mixer: Callable[[int, int, int], nn.Module],
        *,
        classes: int,
        in_channels: int,
        features_only: bool,
        depths: Sequence[int],
        dims: Sequence[int],
        image_size: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__(classes=classes, in_channels=in_channels, features_only=features_only)
        check_stages(4, depths=depths, dims=dims)
        self.channels, self.reductions = tuple(dims), (4, 8, 16, 32)
        self.downsample = nn.ModuleList([Patches(in_channels, dims[0])])
        self.downsample.extend(Merge(a, b) for a, b in pairwise(dims))
        sides = [-(-image_size // reduction) for reduction in self.reductions]

        def block(stage: int, place: int, rate: float) -> Block:
            dim = dims[stage]
            return Block(dim, mixer(stage, place, sides[stage]), int(mlp_ratio * dim), rate)

        self.stages = stages_of(block, depths, drop_path)
        if not features_only:
            self.norm = LayerNorm2d(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(init_linear)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        # Channels last: tokens are then views of maps.
        return super().features(x.contiguous(memory_format=torch.channels_last))


class Patches(nn.Module):
    """A quarter of the image's side: a convolution of patches that do not overlap, and a norm."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 4, stride=4)
        self.norm = LayerNorm2d(out)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e h w"]:
        return self.norm(self.proj(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))))


class Merge(nn.Module):
    """Half the map: the channels of 2 x 2 neighbours in a row, column by column; a norm; a linear map."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e h w"]:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = rearrange(x, "b c (h y) (w x) -> b h w (x y c)", y=2, x=2)
        return self.reduction(self.norm(x)).movedim(-1, 1)


class Block(nn.Module):
    """A mixer of maps and an MLP, each behind a norm."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))


class ShiftedWindowAttention(nn.Module):
    """Softmax attention inside windows, with a learned bias for each relative place.

        y_i = W_o sum_j softmax_j(d^-1/2 q_i . k_j + bias[i - j]) v_j   over the tokens of a window

    Shifted, the grid of windows starts half a window below and right of the corner, and there are narrower
    windows before and behind it; a map with a side of one window or less is not shifted. A map that the
    window does not divide is padded (right, bottom) with hidden tokens.

    dim      channels
    heads    divides dim
    window   side of a window in tokens
    shifted  whether the grid is

    Source: Swin Transformer, arXiv 2103.14030.
    """

    def __init__(self, dim: int, *, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        check_positive("window", window)
        self.heads, self.window, self.shifted = heads, window, shifted
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        window, height, width = self.window, x.shape[2], x.shape[3]
        shift = window // 2 if self.shifted and min(height, width) > window else 0
        x = F.pad(x, (0, -width % window, 0, -height % window))
        x = x.roll((-shift, -shift), (2, 3))  # the narrow windows of both ends now share one
        rows, columns = x.shape[2] // window, x.shape[3] // window
        inside = {"i": rows, "j": columns, "y": window, "x": window}
        tokens = rearrange(x, "b c (i y) (j x) -> b (i j) (y x) c", **inside)
        # Windows stand beside heads, so that the images of a batch share biases.
        q, k, v = rearrange(self.qkv(tokens), "b g n (three h d) -> three b (g h) n d", three=3, h=self.heads)
        bias = relative_bias(self.relative_bias, (window, window)).to(q.dtype)
        bias = bias.expand(rows * columns, -1, -1, -1)
        if shift or (rows * window, columns * window) != (height, width):
            down, right = _parts(height, rows * window, shift), _parts(width, columns * window, shift)
            part = (4 * down[:, None] + right).to(x.device)
            part = rearrange(part, "(i y) (j x) -> (i j) 1 (y x)", **inside)
            bias = bias.masked_fill(part[..., None] != part[..., None, :], float("-inf"))
        y = attention(q, k, v, bias=bias.flatten(0, 1)[None])
        y = self.proj(rearrange(y, "b (g h) n d -> b g n (h d)", h=self.heads))
        y = rearrange(y, "b (i j) (y x) c -> b c (i y) (j x)", **inside).roll((shift, shift), (2, 3))
        return y[..., :height, :width]


def _parts(side: int, padded: int, shift: int) -> Int[Tensor, " padded"]:
    """What tokens of a line, turned round by `shift`, may see: 0 others with 0, 1 turned, 2 padding alike."""
    place = (torch.arange(padded) + shift) % padded
    return (place < shift).long() + 2 * (place >= side).long()
