"""CBAM pool: the mean of a map that is gated twice, by its channels and by its places."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.registry import register


@register("cbam-pool", kind="op", paper="efficient-probing", tags=("pooling", "probe", "image"))
class CBAMPool(nn.Module):
    """Gates of channels, then of places, each made of a mean and a maximum; the mean of what passes.

        a = x sigmoid(mlp(mean_p x) + mlp(max_p x)),    mlp(v) = W2 relu(W1 v)
        b = a sigmoid(BatchNorm(Conv([mean_c a; max_c a])))
        y = mean_p relu(x + b)

    dim     channels
    ratio   inner width of the MLP, in dims
    kernel  side of the convolution, odd

    forward: x (b, dim, height, width), gives (b, dim). Raises ValueError on an even kernel and wrong shapes.
    Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image Modeling,
    arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "ratio": 0.25, "kernel": 3}

    def __init__(
        self,
        dim: int,
        *,
        ratio: float = 1 / 16,
        kernel: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("kernel", kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, must be odd")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = max(1, round(ratio * dim))
        self.dim = dim
        self.fc1 = nn.Linear(dim, hidden, bias=False, **made)
        self.fc2 = nn.Linear(hidden, dim, bias=False, **made)
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False, **made)
        self.bn = nn.BatchNorm2d(1, **made)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        check_map("x", x, self.dim, (2,))
        mean, top = (self.fc2(self.fc1(v).relu()) for v in (x.mean((2, 3)), x.amax((2, 3))))
        gated = x * (mean + top).sigmoid()[:, :, None, None]
        places = torch.stack([gated.mean(1), gated.amax(1)], dim=1)
        gated = gated * self.bn(self.conv(places)).sigmoid()
        return (x + gated).relu().mean((2, 3))

    def example_inputs(self, *, batch: int = 2) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        return {"x": torch.randn(batch, self.dim, 5, 4, generator=generator)}
