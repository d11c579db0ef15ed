"""Efficient channel attention: a gate from a short convolution across the channels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.registry import register


def adaptive_kernel(channels: int) -> int:
    """The paper's kernel size for a number of channels, always odd.

    t = int(|log2(channels) / 2 + 1 / 2|), and t + 1 where t is even (gamma = 2, b = 1).
    """
    t = int(abs((math.log2(channels) + 1) / 2))
    return t if t % 2 else t + 1


@register(
    "eca",
    kind="channel",
    paper="eca",
    tags=("channel", "gate"),
    spatial=(1, 2, 3),
    complexity="O(N C + C k)",
)
class ECA(Mixer):
    """Channel gate whose weights come from one small convolution that runs across the channels.

        z = mean of x over space,  s[c] = sum_j w[j] z[c + j - (k - 1) / 2],  y = x * sigmoid(s)

    z is zero outside the channels. The k weights are shared by all channels; there is no bias.

    dim     channels
    kernel  k, odd; None takes the paper's rule (3 for 64 channels, 5 for 128 to 1024, 7 for 2048)

    Raises ValueError if `kernel` is even or below 1.
    Source: ECA-Net, arXiv 1910.03151. The released ResNets choose k by stage and do not follow the rule:
    give `kernel` when loading them.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        kernel: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if kernel is None:
            kernel = adaptive_kernel(dim)
        check_positive("kernel", kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, must be odd")
        self.kernel = kernel
        self.conv = self._make_conv(device, dtype)

    def _make_conv(self, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Conv1d:
        return nn.Conv1d(1, 1, self.kernel, padding=self.kernel // 2, bias=False, device=device, dtype=dtype)

    def _logits(self, z: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        return self.conv(z[:, None])[:, 0]

    def forward(self, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
        check_map("x", x, self.dim, self.entry.spatial)
        z = x.flatten(2).mean(-1)
        gate = self._logits(z).sigmoid()
        return x * gate.view(*gate.shape, *[1] * (x.ndim - 2))


@register(
    "eca-ns",
    kind="channel",
    paper="eca",
    tags=("channel", "gate"),
    spatial=(1, 2, 3),
    complexity="O(N C + C k)",
)
class ECANS(ECA):
    """ECA without weight sharing: each channel has its own k weights (the paper's ablation "NS").

        s[c] = sum_j W[c, j] z[c + j - (k - 1) / 2]

    Arguments and errors as in `ECA`; dim * k weights. Source: ECA-Net, arXiv 1910.03151.
    """

    def _make_conv(self, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Conv1d:
        return nn.Conv1d(
            self.dim, self.dim, self.kernel, groups=self.dim, bias=False, device=device, dtype=dtype
        )

    def _logits(self, z: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        side = self.kernel // 2
        neighbours = F.pad(z, (side, side)).unfold(1, self.kernel, 1)
        return self.conv(neighbours)[..., 0]
