"""MHS-VM for segmentation: a U-shaped network of multi-head scans."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_map, check_positive, check_stages
from heedful.mixers.scan.mhs_vm import MultiHeadScanGate
from heedful.models.msvmamba import Merge
from heedful.models.parts import DropPath, LayerNorm2d, drop_path_rates, init_linear
from heedful.registry import register

CONFIGS = {
    "mhs_vm_unet_3_heads": {"parameters": 17_386_153, "size": 256, "arguments": {"heads": 3}},
    "mhs_vm_unet_4_heads": {"parameters": 17_257_129, "size": 256, "arguments": {"heads": 4}},
}


@register("mhs-vm-unet", kind="model", paper="mhs-vm", tags=("image", "segmentation", "state space"))
class MHSVMUNet(nn.Module):
    """A pyramid of scans down to 1 / 32 of the image, and another one up, to which the first is added.

        block:  x += gate(LN(x)), the gate of `heedful.mixers.scan.mhs_vm.MultiHeadScanGate`

    A 4 x 4 convolution with stride 4 makes the first map. Down, 2 x 2 tokens become one; up, one becomes
    2 x 2, and 4 x 4 in the end. What enters a stage on the way down is added where its map is left on the
    way up, but for the first map.

    classes         channels of the result; with 1 it is a probability (sigmoid), else logits
    in_channels     of the image
    depths          blocks of each stage down, from the largest map
    decoder_depths  blocks of each stage up, from the smallest map
    dims            channels of each stage; the next has twice as many
    heads           of the scans, 3 or 4
    state_dim       numbers of state a channel of a scan
    threshold       of the fusion of routes
    drop_path       rate of stochastic depth at the smallest map, falling to 0 at the ends

    forward: an image (b, in_channels, height, width), padded with zeros (right, bottom) to multiples of 32;
    gives (b, classes, height, width). Raises ValueError if dims do not double, or another image is given.
    Source: MHS-VM, arXiv 2406.05992.
    """

    example: ClassVar[dict[str, Any]] = {
        "depths": (1, 1, 1, 1),
        "decoder_depths": (1, 1, 1, 1),
        "dims": (8, 16, 32, 64),
        "heads": 3,
        "state_dim": 2,
    }

    def __init__(
        self,
        *,
        classes: int = 1,
        in_channels: int = 3,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        dims: Sequence[int] = (96, 192, 384, 768),
        heads: int = 4,
        state_dim: int = 16,
        threshold: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("classes", classes)
        check_positive("in_channels", in_channels)
        check_stages(4, depths=depths, decoder_depths=decoder_depths, dims=dims)
        if any(2 * a != b for a, b in pairwise(dims)):
            raise ValueError(f"dims is {tuple(dims)!r}, must double from stage to stage")
        self.classes, self.in_channels = classes, in_channels

        def stage(dim: int, rates: list[float]) -> nn.Sequential:
            how = {"heads": heads, "state_dim": state_dim}
            return nn.Sequential(*(Block(dim, threshold=threshold, drop_path=rate, **how) for rate in rates))

        self.embed = nn.Sequential(nn.Conv2d(in_channels, dims[0], 4, stride=4), LayerNorm2d(dims[0]))
        self.down = nn.ModuleList(map(stage, dims, drop_path_rates(depths, drop_path)))
        self.merges = nn.ModuleList(Merge(a, b) for a, b in pairwise(dims))
        rates = [rates[::-1] for rates in drop_path_rates(decoder_depths[::-1], drop_path)[::-1]]
        self.up = nn.ModuleList(map(stage, dims[::-1], rates))
        self.expands = nn.ModuleList(Expand(dim, 2) for dim in dims[:0:-1])
        self.last = Expand(dims[0], 4)
        self.head = nn.Conv2d(dims[0] // 4, classes, 1)
        self.apply(init_linear)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b classes height width"]:
        check_map("x", x, self.in_channels, (2,))
        height, width = x.shape[2:]
        x = self.embed(F.pad(x, (0, -width % 32, 0, -height % 32)))
        kept = []
        for stage, merge in zip(self.down, [*self.merges, nn.Identity()], strict=True):
            kept.append(x)
            x = merge(stage(x))
        x = self.up[0](x)
        for stage, expand, skip in zip(self.up[1:], self.expands, kept[:0:-1], strict=True):
            x = stage(expand(x + skip))
        y = self.head(self.last(x))[:, :, :height, :width]
        return y.sigmoid() if self.classes == 1 else y

    def example_inputs(
        self, *, batch: int = 2, size: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, self.in_channels, *size, generator=generator, dtype=torch.float64)
        return {"x": x.to(dtype)}


class Block(nn.Module):
    """x += gate(LN(x))."""

    def __init__(self, dim: int, *, heads: int, state_dim: int, threshold: float, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim)
        self.mixer = MultiHeadScanGate(dim, heads=heads, state_dim=state_dim, threshold=threshold)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return x + self.drop_path(self.mixer(self.norm(x)))


class Expand(nn.Module):
    """A token becomes factor x factor tokens with 1 / factor of its channels, and a norm."""

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, factor * dim, bias=False)
        self.norm = nn.LayerNorm(dim // factor)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b d tall wide"]:
        x = self.expand(x.movedim(1, -1))
        x = rearrange(x, "b y x (i j d) -> b (y i) (x j) d", i=self.factor, j=self.factor)
        return self.norm(x).movedim(-1, 1)
