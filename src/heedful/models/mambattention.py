"""MambAttention for speech: from a noisy magnitude and phase to clean ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.scan.mambattention import MambAttention
from heedful.registry import register


def _unit(conv: nn.Module, dim: int) -> list[nn.Module]:
    return [conv, nn.InstanceNorm2d(dim, affine=True), nn.PReLU(dim)]


class DenseBlock(nn.Module):
    """3 x 3 convolutions, dilated by 1, 2, 4, 8 over time; each sees all outputs before, newest first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(4):
            conv = nn.Conv2d(dim * (i + 1), dim, 3, padding=(2**i, 1), dilation=(2**i, 1))
            self.layers.append(nn.Sequential(*_unit(conv, dim)))

    def forward(self, x: Float[Tensor, "b c time frequency"]) -> Float[Tensor, "b c time frequency"]:
        skip = x
        for layer in self.layers:
            x = layer(skip)
            skip = torch.cat([x, skip], dim=1)
        return x


@register(
    "mambattention-model",
    kind="model",
    paper="mambattention",
    tags=("audio", "state space", "dense"),
)
class MambAttentionModel(nn.Module):
    """Speech enhancement: a mask for the magnitude and a new phase, from both of the noisy signal.

        x = encoder(mag, phase);  blocks (`heedful.mixers.scan.mambattention.MambAttention`)
        mag' = mag * 2 sigmoid(slope_f mask(x)),   phase' = atan2(i(x), r(x))

    dim, depth   channels, blocks
    bins         frequencies F of the short-time transform, n_fft / 2 + 1; odd
    heads, state_dim, conv_size, expand   of the blocks
    ceiling      2, the largest factor of the mask

    forward: mag and phase (b, F, T); gives mag', phase' and (mag' cos phase', mag' sin phase') (b, F, T, 2).
    Raises ValueError on another number of bins. Source: MambAttention, arXiv 2507.00966.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 8, "depth": 1, "bins": 13, "state_dim": 4, "expand": 2}

    def __init__(
        self,
        dim: int = 64,
        *,
        depth: int = 4,
        bins: int = 201,
        heads: int = 8,
        state_dim: int = 16,
        conv_size: int = 4,
        expand: int = 4,
        ceiling: float = 2.0,
    ) -> None:
        super().__init__()
        check_positive("depth", depth)
        check_positive("bins", bins)
        if bins % 2 == 0 or bins < 3:
            raise ValueError(f"bins is {bins}, must be odd and at least 3")
        self.bins, self.ceiling = bins, ceiling
        self.enter = nn.Sequential(*_unit(nn.Conv2d(2, dim, 1), dim))
        self.enter_dense = DenseBlock(dim)
        self.narrow = nn.Sequential(*_unit(nn.Conv2d(dim, dim, (1, 3), stride=(1, 2)), dim))
        self.blocks = nn.Sequential(
            *(
                MambAttention(dim, heads=heads, state_dim=state_dim, conv_size=conv_size, expand=expand)
                for _ in range(depth)
            )
        )
        self.mask_dense, self.phase_dense = DenseBlock(dim), DenseBlock(dim)
        self.mask = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, (1, 3), stride=(1, 2)),
            *_unit(nn.Conv2d(dim, 1, 1), 1),
            nn.Conv2d(1, 1, 1),
        )
        self.slope = nn.Parameter(torch.ones(bins, 1))
        self.phase = nn.Sequential(*_unit(nn.ConvTranspose2d(dim, dim, (1, 3), stride=(1, 2)), dim))
        self.real, self.imaginary = nn.Conv2d(dim, 1, 1), nn.Conv2d(dim, 1, 1)

    def forward(
        self, mag: Float[Tensor, "b f t"], phase: Float[Tensor, "b f t"]
    ) -> tuple[Float[Tensor, "b f t"], Float[Tensor, "b f t"], Float[Tensor, "b f t two"]]:
        for name, given in (("mag", mag), ("phase", phase)):
            if given.ndim != 3 or given.shape[1] != self.bins:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}, must be (batch, {self.bins}, frames)"
                )
        x = self.enter(torch.stack([mag, phase], dim=1).mT)
        x = self.blocks(self.narrow(self.enter_dense(x)))
        gain = self.mask(self.mask_dense(x))[:, 0].mT
        mag = mag * (self.ceiling * torch.sigmoid(self.slope * gain))
        turned = self.phase(self.phase_dense(x))
        phase = torch.atan2(self.imaginary(turned), self.real(turned))[:, 0].mT
        return mag, phase, torch.stack([mag * phase.cos(), mag * phase.sin()], dim=-1)
