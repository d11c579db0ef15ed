"""CSwin's frame: four convolved stages around any attention, and its attention in crossing stripes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_positive, check_stages
from heedful.mixers.grid.agent_attention import in_stripes
from heedful.models.backbone import head
from heedful.models.parts import DropPath, LayerNorm2d, Mlp, init_linear
from heedful.models.pyramid import Pyramid, stages_of
from heedful.ops.attention import attention


class CSwin(Pyramid):
    """Four stages of equal blocks; the head sees the mean of the last map behind a norm.

        block:  q, k, v = W LN(x);   x += W_o attention(q, k, v);   x += mlp(LN(x))

    A 7 x 7 convolution, later 3 x 3, makes the map of each stage. Images that 4 x 4 does not divide are
    padded with zeros (right, bottom).

    attend      (stage, block of the stage, side of its map) -> a module that takes q, k, v as (3, b, c,
                height, width), and x as (b, c, height, width)
    depths      blocks of each stage
    dims        channels of each stage
    image_size  side of the images trained on
    mlp_ratio   width of the MLP, in dims
    drop_path   rate of stochastic depth in the last block, growing from 0
    """

    def __init__(
        self,
        attend: Callable[[int, int, int], nn.Module],
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
        self.downsample = nn.ModuleList([Smaller(in_channels, dims[0], kernel=7, stride=4)])
        self.downsample.extend(Smaller(a, b, kernel=3, stride=2) for a, b in pairwise(dims))
        sides = [-(-image_size // reduction) for reduction in self.reductions]

        def block(stage: int, place: int, rate: float) -> Block:
            dim = dims[stage]
            return Block(dim, attend(stage, place, sides[stage]), int(mlp_ratio * dim), rate)

        self.stages = stages_of(block, depths, drop_path)
        if not features_only:
            self.norm = LayerNorm2d(dims[-1])
            self.head = head(dims[-1], classes)
        self.apply(init_linear)

    def features(self, x: Float[Tensor, "b c height width"]) -> list[Tensor]:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        # Channels last: tokens are then views of maps.
        return super().features(x.contiguous(memory_format=torch.channels_last))


class Smaller(nn.Sequential):
    """A convolution whose patches overlap, and a norm."""

    def __init__(self, dim: int, out: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride=stride, padding=(kernel - stride + 1) // 2)
        self.norm = LayerNorm2d(out)


class Block(nn.Module):
    """Attention of projected maps and an MLP, each behind a norm."""

    def __init__(self, dim: int, attend: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attend = attend
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        qkv = rearrange(self.qkv(self.norm1(x).movedim(1, -1)), "b h w (three c) -> three b c h w", three=3)
        y = self.proj(self.attend(qkv, x).movedim(1, -1)).movedim(-1, 1)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))


class Stripes(nn.Module):
    """Attention within the stripes of a map.

    A core alone has the whole map as its only stripe. Of two, the first has upright stripes and the first
    half of the channels, the second level stripes and the others. What a side has beyond whole stripes is a
    narrower one.

    cores   take tokens q, k, v (b, n, c) and the size of their map
    stripe  width of the stripes of two cores
    """

    def __init__(self, *cores: nn.Module, stripe: int = 1) -> None:
        super().__init__()
        check_positive("stripe", stripe)
        self.cores = nn.ModuleList(cores)
        self.stripe = stripe

    def forward(
        self, qkv: Float[Tensor, "3 b c height width"], x: Float[Tensor, "b c height width"]
    ) -> Float[Tensor, "b c height width"]:
        if len(self.cores) == 1:
            return in_stripes(self.cores[0], qkv, stripe=x.shape[-1], axis=-1)
        y = [
            in_stripes(core, half, stripe=self.stripe, axis=axis)
            for core, half, axis in zip(self.cores, qkv.chunk(2, dim=2), (-1, -2), strict=True)
        ]
        return torch.cat(y, dim=1)


class LePEAttention(nn.Module):
    """Softmax attention of projected tokens, and a convolution: y = softmax(d^-1/2 q k^T) v + DWConv3x3(v).

    dim    channels
    heads  divides dim
    """

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(
        self,
        q: Float[Tensor, "b n c"],
        k: Float[Tensor, "b n c"],
        v: Float[Tensor, "b n c"],
        *,
        size: tuple[int, int],
    ) -> Float[Tensor, "b n c"]:
        local = self.dwc(v.mT.unflatten(2, size)).flatten(2).mT
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        return rearrange(attention(q, k, v), "b h n d -> b n (h d)") + local


def crossing(dim: int, *, heads: int, stripe: int, side: int) -> Stripes:
    """CSwin's softmax attention of maps with this side, which may be no more than one stripe.

    heads: of both directions together.
    """
    if stripe >= side:
        return Stripes(LePEAttention(dim, heads=heads))
    if heads % 2:
        raise ValueError(f"heads is {heads}, must be even: half of them for each direction")
    return Stripes(*(LePEAttention(dim // 2, heads=heads // 2) for _ in range(2)), stripe=stripe)
