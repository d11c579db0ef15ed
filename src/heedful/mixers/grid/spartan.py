"""SpaRTAN's two mixers: two receptive fields with gates, and channels as waves that add and turn."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.mixers.squeeze_excite import SqueezeExcite
from heedful.registry import register


@register(
    "multi-order-spatial-mixer",
    kind="grid",
    paper="spartan",
    tags=("gate", "conv", "mobile"),
    aliases=("smixer",),
    spatial=(2,),
    complexity="O(N C^2)",
)
class MultiOrderSpatialMixer(Mixer):
    """A near and a wide convolution side by side, each with its gate.

        z = W_in x + b_in,   z = z + gamma (z - mean(z))
        near = SE(conv3x3(z)),   wide = SE(conv3x3 dilated(conv3x3 dilated(z)))
        y = W_out [near, wide] + b_out

    Both branches have half of the channels and end in BatchNorm and GELU before their gate SE.

    dim        channels, a multiple of 8
    depthwise  the 3 x 3 convolutions do not mix channels

    Raises ValueError if dim is no multiple of 8. Source: SpaRTAN, arXiv 2507.10999.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        depthwise: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        _check_multiple(dim, 8)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        half = dim // 2
        groups = half if depthwise else 1
        self.proj_in = nn.Conv2d(dim, half, 1, **where)
        self.gamma = nn.Parameter(torch.full((half, 1, 1), 1e-5, **where))
        self.near = conv_norm_act(half, half, groups=groups, **where)
        self.wide = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=2, dilation=2, groups=groups, bias=False, **where),
            conv_norm_act(half, half, dilation=2, groups=groups, **where),
        )
        self.near_gate = SqueezeExcite(half, half // 4, **where)
        self.wide_gate = SqueezeExcite(half, half // 4, **where)
        self.proj_out = nn.Conv2d(dim, dim, 1, **where)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        z = self.proj_in(x)
        z = z + self.gamma * (z - z.mean((2, 3), keepdim=True))
        near, wide = self.near_gate(self.near(z)), self.wide_gate(self.wide(z))
        return self.proj_out(torch.cat([near, wide], dim=1))


@register(
    "wave-channel-mixer",
    kind="grid",
    paper="spartan",
    tags=("gate", "conv", "mobile"),
    aliases=("cmixer",),
    spatial=(2,),
    complexity="O(N C^2)",
)
class WaveChannelMixer(Mixer):
    """Channels as waves: each is joined by that of the strongest channel, then pairs turn in their plane.

        s = argmax_c x_c                                                  for each pixel
        theta = GELU(W_t x + b_t),   w = W_w x + b_w
        f = w theta + w_s theta_s
        f_(2j) + i f_(2j+1) is multiplied by a complex number z_j         in float32 at least
        y = W_out SE(GELU(BatchNorm(conv3x3(f)))) + b_out

    Of equally strong channels the first counts; the choice s itself passes no gradient.

    dim        channels, a multiple of 4
    expand     width of the waves over dim
    depthwise  the 3 x 3 convolution does not mix waves; else it mixes `expand` neighbours

    Raises ValueError if dim is no multiple of 4. Source: SpaRTAN, arXiv 2507.10999.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "expand": 2}

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 4,
        depthwise: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        _check_multiple(dim, 4)
        check_positive("expand", expand)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        waves = dim * expand
        self.theta = nn.Conv2d(dim, waves, 1, **where)
        self.weight = nn.Conv2d(dim, waves, 1, **where)
        self.act = nn.GELU()
        self.turn = nn.Parameter(torch.randn(waves // 2, 2, **where))
        self.conv = conv_norm_act(waves, waves, groups=waves if depthwise else dim, **where)
        self.gate = SqueezeExcite(waves, dim // 4, **where)
        self.proj_out = nn.Conv2d(waves, dim, 1, **where)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        strongest = x.argmax(1, keepdim=True)
        theta, weight = self.act(self.theta(x)), self.weight(x)
        waves = weight * theta + weight.gather(1, strongest) * theta.gather(1, strongest)
        return self.proj_out(self.gate(self.conv(self.turned(waves))))

    def turned(self, waves: Float[Tensor, "b e height width"]) -> Float[Tensor, "b e height width"]:
        """Pairs of channels times their complex numbers."""
        with torch.autocast(waves.device.type, enabled=False):
            wide = torch.promote_types(waves.dtype, torch.float32)
            real, imaginary = waves.to(wide).unflatten(1, (-1, 2)).unbind(2)
            a, b = self.turn.to(wide)[:, :, None, None].unbind(1)
            pairs = torch.stack([real * a - imaginary * b, real * b + imaginary * a], dim=2)
            return pairs.flatten(1, 2).to(waves.dtype)


def conv_norm_act(
    dim: int, out: int, *, stride: int = 1, dilation: int = 1, groups: int = 1, **where: Any
) -> nn.Sequential:
    """A 3 x 3 convolution without bias, BatchNorm and GELU."""
    return nn.Sequential(
        nn.Conv2d(
            dim,
            out,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            bias=False,
            **where,
        ),
        nn.BatchNorm2d(out, eps=1e-6, **where),
        nn.GELU(),
    )


def _check_multiple(dim: int, of: int) -> None:
    if dim % of:
        raise ValueError(f"dim is {dim}, must be a multiple of {of}")
