"""Parts of BEVANet: strip attention blocks, pyramid pooling, and what joins the branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.mixers.grid.bevanet import (
    LargeSeparableKernelAttention,
    SparseDecomposedLargeSeparableKernelAttention,
)
from heedful.models.metaformer_poolformer import MetaFormerBlock
from heedful.models.parts import LayerScale
from heedful.models.van_lka import VANMlp


def norm_act_conv(dim: int, out: int, kernel: int = 1, *, dilation: int = 1) -> nn.Sequential:
    """BatchNorm, ReLU and a convolution without bias that keeps the size."""
    padding = kernel // 2 * dilation
    return nn.Sequential(
        nn.BatchNorm2d(dim),
        nn.ReLU(),
        nn.Conv2d(dim, out, kernel, padding=padding, dilation=dilation, bias=False),
    )


def enlarged(x: Float[Tensor, "b c height width"], like: Tensor) -> Float[Tensor, "b c height2 width2"]:
    """x at the size of another map, bilinearly."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class StripAttention(nn.Module):
    """A gating map between two convolutions, with a residual of its own: x + W_2 gate(GELU(W_1 x))."""

    def __init__(self, dim: int, gate: nn.Module) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.gate = gate
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return x + self.proj_out(self.gate(self.act(self.proj_in(x))))


class EVABlock(MetaFormerBlock):
    """x += l_1 strips(BN x);   x += l_2 mlp(BN x);   l from 0.01."""

    def __init__(self, dim: int, *, kernel: int, mlp_ratio: float = 4.0) -> None:
        gate = SparseDecomposedLargeSeparableKernelAttention(dim, kernel=kernel)
        mlp = VANMlp(dim, int(dim * mlp_ratio))
        super().__init__(dim, StripAttention(dim, gate), mlp, norm=nn.BatchNorm2d, layer_scale=1e-2)


class PyramidPooling(nn.Module):
    """DLKPPM: means at five scales, added up from fine to coarse, beside large kernel attention.

        s_0 ... s_4: conv of x, and of x averaged by 2, by 4, to 2 x 2 and to a single pixel, enlarged
        z_0 = s_0;   z_1 = P(s_1 + z_0);   z_2 = P(s_2 + z_1);   z_3 = P(z_2 + z_0 + l attention(BN z_0))
        z_4 = P(s_3 + z_3);   z_5 = P(s_4 + z_4);   y = conv[z_0 ... z_5] + conv(x)

    dim, branch, out: channels of x, inside and of y.
    """

    def __init__(self, dim: int, branch: int, out: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(norm_act_conv(dim, branch) for _ in range(5))
        self.norm = nn.BatchNorm2d(branch)
        self.attention = StripAttention(branch, LargeSeparableKernelAttention(branch, kernel=35))
        self.attention_scale = LayerScale(branch, init=1e-2)
        self.process = nn.ModuleList(
            norm_act_conv(branch, branch, 3, dilation=dilation) for dilation in (2, 2, 1, 1, 1)
        )
        self.join = norm_act_conv(6 * branch, out)
        self.shortcut = norm_act_conv(dim, out)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b e height width"]:
        pooled = [
            x,
            F.avg_pool2d(x, 5, 2, 2),
            F.avg_pool2d(x, 9, 4, 4),
            F.adaptive_avg_pool2d(x, 2),
            F.adaptive_avg_pool2d(x, 1),
        ]
        s = [enlarged(scale(part), x) for scale, part in zip(self.scales, pooled, strict=True)]
        wide = s[0] + self.attention_scale(self.attention(self.norm(s[0])))
        z = [s[0]]
        for process, other in zip(self.process, [s[1], s[2], wide, s[3], s[4]], strict=True):
            z.append(process(other + z[-1]))
        return self.join(torch.cat(z, dim=1)) + self.shortcut(x)


class BoundaryGuidedFusion(nn.Module):
    """BGAF: the detail map where there is a boundary, the semantic one elsewhere.

    e = sigmoid(boundary);   y = P(e p + (1 - e) i + p + i),   p = P(detail),   i = P(semantic)
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.detail, self.semantic = norm_act_conv(dim, dim, 3), norm_act_conv(dim, dim, 3)
        self.join = norm_act_conv(dim, out, 3)

    def forward(
        self, detail: Tensor, semantic: Tensor, boundary: Tensor
    ) -> Float[Tensor, "b c height width"]:
        edge = boundary.sigmoid()
        p, i = self.detail(detail), self.semantic(semantic)
        return self.join(edge * p + (1 - edge) * i + p + i)


class PixelAttentionFusion(nn.Module):
    """PagFM: each pixel of x takes the more of y the more alike they are.

    s = sigmoid(sum_c f(x)_c g(y)_c);   y and g(y) enlarged to the size of x;   out = (1 - s) x + s y
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.of_x, self.of_y = (
            nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden)) for _ in range(2)
        )

    def forward(
        self, x: Float[Tensor, "b c height width"], y: Float[Tensor, "b c height2 width2"]
    ) -> Float[Tensor, "b c height width"]:
        alike = (self.of_x(x) * enlarged(self.of_y(y), x)).sum(1, keepdim=True).sigmoid()
        return (1 - alike) * x + alike * enlarged(y, x)


class SegmentHead(nn.Sequential):
    """Classes from a map: BN, ReLU, conv3x3, BN, ReLU, conv1x1."""

    def __init__(self, dim: int, hidden: int, classes: int) -> None:
        super().__init__(
            *norm_act_conv(dim, hidden, 3), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, classes, 1)
        )
