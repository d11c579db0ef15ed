"""A map as each place of a convolution's window sees it, without copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def window_views(
    maps: Float[Tensor, "..."],
    kernel: tuple[int, int],
    *,
    dilation: int = 1,
    channels_last: bool = False,
) -> Iterator[Float[Tensor, "..."]]:
    """For each place of an odd window, row by row, the map shifted by it; zeros come in at the borders.

    maps    (..., height, width), or (..., height, width, d) with channels_last
    kernel  height and width of the window, its places `dilation` apart

    The views share one padded copy of the map, so that a sum over a window needs no map for each place.
    """
    down, right = dilation * (kernel[0] // 2), dilation * (kernel[1] // 2)
    behind = (0, 0) if channels_last else ()
    axis = maps.ndim - (3 if channels_last else 2)
    height, width = maps.shape[axis : axis + 2]
    padded = F.pad(maps, (*behind, right, right, down, down))
    for i in range(kernel[0]):
        rows = padded.narrow(axis, i * dilation, height)
        for j in range(kernel[1]):
            yield rows.narrow(axis + 1, j * dilation, width)
