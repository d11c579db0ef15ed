"""MAViT: RAVLT's frame around magnitude-aware linear attention."""

from __future__ import annotations

from typing import Any, ClassVar

from heedful.mixers.grid.mala import MagnitudeAwareLinearAttention
from heedful.mixers.grid.rala import RankAugmentedLinearAttention
from heedful.models.rala import RAVLT
from heedful.registry import register

CONFIGS = {
    "mavit_tiny": {"parameters": 16_449_128, "arguments": {}},
    "mavit_small": {
        "parameters": 27_142_568,
        "arguments": {"depths": (3, 5, 9, 3), "dims": (64, 128, 320, 512), "heads": (1, 2, 5, 8)},
    },
    "mavit_base": {
        "parameters": 49_792_648,
        "arguments": {
            "depths": (4, 6, 12, 6),
            "dims": (96, 192, 384, 512),
            "heads": (1, 2, 6, 8),
            "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
        },
    },
    "mavit_large": {
        "parameters": 97_766_088,
        "arguments": {
            "depths": (4, 7, 19, 8),
            "dims": (96, 192, 448, 640),
            "heads": (1, 2, 7, 10),
            "projection": 2560,
            "layer_scale": (1e-6, 1e-6, 1e-6, 1e-6),
        },
    },
}


@register("mala-backbone", kind="model", paper="mala", tags=("image", "linear"))
class MAViT(RAVLT):
    """RAVLT with magnitude-aware linear attention in its two wide stages, and a wider projection.

    Arguments as in `RAVLT`; `projection` is 2048. Source: MALA, arXiv 2507.00698.
    """

    linear: ClassVar[type[RankAugmentedLinearAttention]] = MagnitudeAwareLinearAttention

    def __init__(self, *, projection: int = 2048, **arguments: Any) -> None:
        super().__init__(projection=projection, **arguments)
