"""Attention inside the regions of an image that a label map gives."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from heedful.checks import check_divides, check_map
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register
from heedful.routing.regions import region_table


@register(
    "region-attention",
    kind="grid",
    paper="region-attention-transformer",
    tags=("sparse", "restoration"),
    aliases=("r-msa",),
    spatial=(2,),
    extra_inputs=("labels",),
    complexity="O(sum over regions of size^2 C)",
)
class RegionAttention(Mixer):
    """Each pixel attends to the pixels of its region.

        y_i = W_o concat_h sum_j softmax_j(q_i . k_j / sqrt(heads)) v_j + b_o,   j with label_j = label_i

    The scale takes the number of heads, not their width, as published. Tokens are sorted by label, so that
    the cost is that of the regions, whatever their shape.

    dim    channels
    heads  a divisor of dim

    forward takes labels (b, height, width) of any kind that can be compared; None: all is one region.
    Raises ValueError if heads do not divide dim, or on labels of another shape.
    Source: Region Attention Transformer, arXiv 2407.09268.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, device=device, dtype=dtype)
        self.proj = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "b c height width"],
        *,
        labels: Shaped[Tensor, "b height width"] | None = None,
    ) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size = x.shape[2:]
        qkv = rearrange(self.qkv(x), "b (s h d) height width -> s b h (height width) d", s=3, h=self.heads)
        if labels is None:
            y = attention(*qkv, scale=self.heads**-0.5)
        else:
            if labels.shape != (x.shape[0], *size):
                raise ValueError(
                    f"labels has shape {tuple(labels.shape)}, must be {(x.shape[0], *size)}, one a pixel"
                )
            ascending, order = labels.flatten(1).sort(dim=1, stable=True)
            place = order[:, None, :, None].expand(-1, self.heads, -1, qkv.shape[-1])
            q, k, v = (t.gather(2, place) for t in qkv)
            mixed = attention(q, k, v, pattern=region_table(ascending), scale=self.heads**-0.5)
            y = torch.zeros_like(mixed).scatter(2, place, mixed)
        # Channels in front before the convolution: its backward is given a contiguous gradient.
        return self.proj(rearrange(y, "b h n d -> b (h d) n").unflatten(2, size))

    def example_inputs(self, **how: Any) -> dict[str, Tensor]:
        """A map and four labels that are scattered over it."""
        inputs = super().example_inputs(**how)
        b, _, height, width = inputs["x"].shape
        generator = torch.Generator().manual_seed(1)
        return {**inputs, "labels": torch.randint(0, 4, (b, height, width), generator=generator)}
