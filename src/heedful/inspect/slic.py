"""SLIC superpixels of a picture of one channel, such as a spectrogram."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_positive


def slic(
    image: Float[Tensor, "height width"],
    segments: int,
    *,
    compactness: float = 0.1,
    sigma: float = 1.0,
    rounds: int = 10,
) -> Int[Tensor, "height width"]:
    """About `segments` compact regions of like brightness, numbered from 0: k-means in place and brightness.

        d(pixel, centre)^2 = (brightness difference)^2 + compactness^2 (distance in the plane / step)^2

    image        brightness, best in [0, 1]
    segments     wanted; centres start on a grid of cells of step x step = height width / segments
    compactness  how much places count beside brightness
    sigma        of the Gaussian blur beforehand, in pixels; 0 for none
    rounds       of k-means; a centre reaches 2 steps far

    Regions need not be connected. Source: Achanta et al. 2012, SLIC superpixels.
    """
    check_positive("segments", segments)
    height, width = image.shape
    value = _blurred(image.double().cpu(), sigma)
    step = math.sqrt(height * width / segments)
    rows, columns = (max(1, round(side / step)) for side in (height, width))
    centre_y = ((torch.arange(rows) + 0.5) * height / rows - 0.5).repeat_interleave(columns).tolist()
    centre_x = ((torch.arange(columns) + 0.5) * width / columns - 0.5).repeat(rows).tolist()
    level = [float(value[round(y), round(x)]) for y, x in zip(centre_y, centre_x, strict=True)]
    ys, xs = torch.arange(height).double()[:, None], torch.arange(width).double()
    grid_y, grid_x = ys.expand(height, width).flatten(), xs.expand(height, width).flatten()
    reach = 2 * max(step, height / rows, width / columns)
    label = torch.zeros(height, width, dtype=torch.long)
    for _ in range(rounds):
        best = torch.full((height, width), torch.inf, dtype=torch.float64)
        for i, (y, x, v) in enumerate(zip(centre_y, centre_x, level, strict=True)):
            near = (
                slice(max(0, math.ceil(y - reach)), math.floor(y + reach) + 1),
                slice(max(0, math.ceil(x - reach)), math.floor(x + reach) + 1),
            )
            apart = (ys[near[0]] - y).square() + (xs[near[1]] - x).square()
            d = (value[near] - v).square() + (compactness / step) ** 2 * apart
            closer = d < best[near]
            best[near] = torch.where(closer, d, best[near])
            label[near] = torch.where(closer, i, label[near])
        size = torch.bincount(label.flatten(), minlength=len(level)).clamp(min=1)
        moved = [
            (torch.bincount(label.flatten(), weight, minlength=len(level)) / size).tolist()
            for weight in (grid_y, grid_x, value.flatten())
        ]
        centre_y, centre_x, level = moved
    return label.unique(return_inverse=True)[1].to(image.device)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """A Gaussian to 4 sigma, with the picture's edge carried on."""
    if sigma <= 0:
        return image
    radius = int(4 * sigma + 0.5)
    bell = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2)
    bell = (bell / bell.sum()).view(1, 1, -1, 1)
    out = F.conv2d(F.pad(image[None, None], (0, 0, radius, radius), mode="replicate"), bell)
    return F.conv2d(F.pad(out, (radius, radius, 0, 0), mode="replicate"), bell.mT)[0, 0]
