"""CLIP pool: the mean of a map attends to the map, all with learned positions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.pooling.token_attention import attend
from heedful.registry import register


@register("clip-pool", kind="op", paper="efficient-probing", tags=("pooling", "probe", "image"))
class CLIPPool(nn.Module):
    """Self-attention of the tokens of a map and their mean, of which the mean's answer is kept.

        u = [mean(x); x] + positions,   [q, k, v] = Wqkv u + b
        y = Wo softmax(q_0 k^T / sqrt(dim / heads)) v + bo

    dim    channels
    heads  attention heads, divides dim
    size   (height, width) of the maps trained on; positions are interpolated for others

    forward: x (b, dim, height, width), gives (b, dim). Raises ValueError if heads does not divide dim, and on
    wrong shapes. Source: the comparison in Attention, Please! Revisiting Attentive Probing for Masked Image
    Modeling, arXiv 2506.10178.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "size": (4, 3)}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 16,
        size: tuple[int, int] = (14, 14),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        for side in size:
            check_positive("size", side)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.size = dim, heads, size
        self.pos_embed = nn.Parameter(torch.randn(1 + size[0] * size[1], dim, **made) * dim**-0.5)
        self.qkv = nn.Linear(dim, 3 * dim, **made)
        self.proj = nn.Linear(dim, dim, **made)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c"]:
        check_map("x", x, self.dim, (2,))
        size = (x.shape[2], x.shape[3])
        first, grid = self.pos_embed[:1], self.pos_embed[1:]
        if size != self.size:
            old = grid.T.reshape(1, self.dim, *self.size)
            grid = F.interpolate(old, size=size, mode="bicubic", align_corners=False)[0].flatten(1).T
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True) + first, tokens + grid], dim=1)
        query, key, value = self.qkv(tokens).chunk(3, -1)
        return self.proj(attend(query[:, :1], key, value, heads=self.heads, mask=None))[:, 0]

    def example_inputs(self, *, batch: int = 2) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        return {"x": torch.randn(batch, self.dim, *self.size, generator=generator)}
