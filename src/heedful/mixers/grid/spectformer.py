"""Spectral gating: a learned filter in the 2-D Fourier domain, as wide as the map."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.precision import no_autocast
from heedful.registry import register


@register(
    "spectral-gating",
    kind="grid",
    paper="spectformer",
    tags=("spectral", "linear"),
    aliases=("global-filter", "spectral-gating-network"),
    spatial=(2,),
    complexity="O(N log N C)",
)
class SpectralGating(Mixer):
    """Every frequency of a channel times a learned complex number: a circular convolution over the whole map.

        Y = irfft2(W * rfft2(X)),   W (height, width // 2 + 1, dim), both transforms orthonormal

    dim   channels
    size  (height, width) of the maps trained on; on others W is resized (bicubic, corners kept: frequency 0
          stays frequency 0)

    Transforms run in float32 at least. The imaginary parts of W at frequencies that are their own conjugates
    (0 and the highest) have no effect. Raises ValueError unless sides are at least 1.
    Sources: SpectFormer, arXiv 2304.06446; the filter: GFNet, arXiv 2107.00645.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "size": (9, 7)}

    def __init__(
        self,
        dim: int,
        *,
        size: tuple[int, int] = (14, 14),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        for name, side in zip(("size[0]", "size[1]"), size, strict=True):
            check_positive(name, side)
        height, width = self.size = size
        table = torch.empty(height, width // 2 + 1, dim, 2, device=device, dtype=dtype)
        self.complex_weight = nn.Parameter(nn.init.normal_(table, std=0.02))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size = (x.shape[2], x.shape[3])
        if len(x) == 0:
            return x.clone()  # the CPU's transform refuses an empty batch
        with no_autocast(x):
            wide = torch.promote_types(x.dtype, torch.float32)
            spectrum = torch.fft.rfft2(x.to(wide), norm="ortho") * self.filter(size, wide)
            return torch.fft.irfft2(spectrum, s=size, norm="ortho").to(x.dtype)

    def filter(self, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
        """W for a map of this size, complex, (dim, height, width // 2 + 1)."""
        table = self.complex_weight.to(dtype).permute(2, 3, 0, 1)
        if size != tuple(self.size):
            resized = (size[0], size[1] // 2 + 1)
            table = F.interpolate(table, size=resized, mode="bicubic", align_corners=True)
        return torch.view_as_complex(table.movedim(1, -1).contiguous())
