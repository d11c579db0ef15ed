"""MSA-Conv: self-attention inside the window of a convolution, then that convolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.window_views import window_views
from heedful.registry import register


@register(
    "tic",
    kind="grid",
    paper="tic",
    tags=("local", "softmax", "convolution"),
    aliases=("msa-conv",),
    spatial=(2,),
    complexity="O(N k^2 C^2)",
)
class MSAConv2d(Mixer):
    """Every pixel attends to the dilated window around it; the result and x go through a convolution.

        a_t = softmax_t(d^-1/2 q . k_t),   z = sum_t a_t v_t,   y = relu(Conv(z + x))

    t runs over the places of the window row by row. Places outside of the map are not masked: their logit is
    0 and so is their value. The convolution has the same kernel, without dilation and bias.

    dim          channels
    dim_out      channels of the result, default dim
    heads        divides dim; the authors' layer has one over all channels
    kernel_size  sides of the window, odd: one number, or height and width
    dilation     distance of the window's places
    stride       of the convolution alone
    dropout      share of the attention weights dropped in training

    The result is (b, dim_out, ceil(height / stride), ceil(width / stride)). Raises ValueError if heads do not
    divide dim, and for an even kernel. Source: TiC, arXiv 2310.04134.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12, "heads": 2}

    def __init__(
        self,
        dim: int,
        *,
        dim_out: int | None = None,
        heads: int = 1,
        kernel_size: int | Sequence[int] = 3,
        dilation: int = 1,
        stride: int = 1,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("dilation", dilation)
        check_positive("stride", stride)
        high, wide = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        for side in (high, wide):
            check_positive("kernel_size", side)
            if side % 2 == 0:
                raise ValueError(f"kernel_size is {kernel_size}, must be odd")
        self.heads, self.kernel, self.dilation = heads, (high, wide), dilation
        self.scale = (dim // heads) ** -0.5
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, **factory)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(
            dim,
            dim if dim_out is None else dim_out,
            self.kernel,
            stride=stride,
            padding=(high // 2, wide // 2),
            bias=False,
            **factory,
        )

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height2 width2"]:
        check_map("x", x, self.dim, self.entry.spatial)
        attended, _ = self.attend(x)
        return F.relu(self.conv(attended + x))

    def attend(
        self, x: Float[Tensor, "b c height width"]
    ) -> tuple[Float[Tensor, "b c height width"], Float[Tensor, "b h t height width"]]:
        """z, and the weights of the window of every pixel."""
        query, key, value = (y.unflatten(1, (self.heads, -1)) for y in self.qkv(x).chunk(3, dim=1))
        # 1. Products with the window, place by place: none of its maps is copied.
        dots = torch.stack([(query * there).sum(2) for there in self._views(key)], dim=2)
        # 2. Softmax over the window.
        weights = (dots.float() if dots.dtype.itemsize < 4 else dots).mul(self.scale).softmax(2)
        weights = weights.to(value.dtype)
        # 3. The mean of the values.
        kept = self.dropout(weights)
        z = torch.zeros_like(value)
        for share, there in zip(kept.unbind(2), self._views(value), strict=True):
            z = torch.addcmul(z, share[:, :, None], there)
        return z.flatten(1, 2), weights

    def _views(self, maps: Float[Tensor, "b h d height width"]) -> Iterator[Tensor]:
        return window_views(maps, self.kernel, dilation=self.dilation)
