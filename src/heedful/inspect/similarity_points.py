"""Where a token points to in a picture: similarity to the image tokens, and points that prompt a segmenter.

Models that segment by a token of their own, such as <SEG>, end with hidden states of it and of the image
tokens. Their similarity says where to look, and similarity as points (SasP) turns that map into point prompts
that gradients can pass through.
Source: Reasoning to Attend (READ), arXiv 2412.17741.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register


@register("seg-token-similarity-map", kind="inspect", paper="read-sasp", tags=("image", "segmentation"))
def seg_token_similarity_map(
    image: Float[Tensor, "b m c"], seg: Float[Tensor, "s c"]
) -> Float[Tensor, "b m s"]:
    """How alike each image token and each of some tokens are, the tokens weighed against each other.

        sim_js = w_s I_j . t_s,   w_s = p_s / mean_s p_s,   p = softmax_s(2 I_1 . t_s)

    image  hidden states of the last layer at the image tokens, as they are
    seg    hidden states of the same layer at the tokens that point; of a single one w is 1, and sim the plain
           dot product

    These are hidden states, not attention weights. Source: READ, arXiv 2412.17741.
    """
    products = image @ seg.mT
    share = (2 * products[:, :1]).softmax(-1)
    return share / share.mean(-1, keepdim=True) * products


class LabelledPoints(NamedTuple):
    """Points (x, y) in pixels, and labels: 1 on the object, 0 beside it, -1 neither.

    Segment Anything encodes -1 as "not a point": such a prompt is encoded, not left out.
    """

    points: Int[Tensor, "p 2"]
    labels: Int[Tensor, " p"]


@register(
    "similarity-as-points", kind="inspect", paper="read-sasp", aliases=("sasp",), tags=("image", "prompt")
)
def similarity_to_points(
    similarity: Float[Tensor, " m"],
    size: tuple[int, int],
    *,
    down_sample: int = 2,
    num_points: int = 30,
    t_pos: float = 0.8,
    t_neg: float = 0.2,
) -> LabelledPoints:
    """The places of a picture that are most, least and middling alike to a token, as point prompts.

    The map, of the central square of the picture, is made coarser and scaled to [0, 1]. Its cells are
    positive from t_pos on, the highest first; negative up to t_neg, the lowest first; or neutral, in reading
    order. The first num_points of these three lists are told, each as the middle of its cell.

    similarity   (side^2), row by row, of the square that is left of the picture when its middle is cut out
    size         (height, width) of the whole picture, in pixels
    down_sample  the coarser map has side // down_sample cells a side

    The defaults are those of the 7B model; that of 13B has 1, 60, 0.6 and 0.2. Fewer points come back where
    the map has fewer cells. Where all cells are the same they are neutral. There is no gradient; it is the
    points of `discrete_to_continuous` that have one. ValueError where the map is no square, not finite, or
    too small.
    Source: READ, arXiv 2412.17741.
    """
    side = _side(similarity, size)
    check_positive("down_sample", down_sample)
    check_positive("num_points", num_points)
    if not 0 <= t_neg < t_pos <= 1:
        raise ValueError(f"t_neg is {t_neg} and t_pos is {t_pos}, must be 0 <= t_neg < t_pos <= 1")
    if down_sample > side:
        raise ValueError(f"down_sample is {down_sample}, must be at most {side}, the side of the map")
    # 1. The map in g x g cells, from 0 to 1.
    g = side // down_sample
    coarse = _resized(similarity.detach().unflatten(0, (side, side)), (g, g))
    low, high = coarse.amin(), coarse.amax()
    flat = torch.full_like(coarse, (t_neg + t_pos) / 2)
    coarse = (coarse - low) / (high - low) if high > low else flat
    # 2. Cells of the same size over the whole picture; those beside the square are out of reach.
    around = [(length * g // min(size) - g) // 2 for length in size]
    cells = F.pad(coarse, (around[1], around[1], around[0], around[0]), value=-1.0)
    height, width = cells.shape
    value = cells.flatten()
    # 3. Which cells, by kind.
    high_first, low_first = value.argsort(descending=True, stable=True), value.argsort(stable=True)
    kinds = {
        1: high_first[value[high_first] >= t_pos],
        0: low_first[(value[low_first] >= 0) & (value[low_first] <= t_neg)],
        -1: ((value > t_neg) & (value < t_pos)).nonzero()[:, 0],
    }
    index = torch.cat([*kinds.values()])[:num_points]
    labels = torch.cat([torch.full_like(places, label) for label, places in kinds.items()])[:num_points]
    # 4. Their middles, in whole pixels.
    x = (2 * (index % width) + 1) * size[1] // (2 * width)
    y = (2 * (index // width) + 1) * size[0] // (2 * height)
    return LabelledPoints(torch.stack([x, y], -1), labels)


def discrete_to_continuous(
    similarity: Float[Tensor, " m"],
    points: Int[Tensor, "p 2"],
    size: tuple[int, int],
    *,
    resolution: int = 336,
) -> Float[Tensor, "p 2"]:
    """The points, moved by less than a pixel towards what is more alike, so that gradients reach the map.

        p' = sum_u w_u u / sum_u w_u,   w_u = exp(-||u - p||^2) exp(Z_u)   over all pixels u of the picture

    Z is the map from 0 to 1 at the size of the picture, 0 beside its central square.

    similarity  as for `similarity_to_points`
    points      (x, y) in pixels within the picture
    resolution  of the square that the vision model saw, in pixels

    ValueError where a point lies outside. Source: READ, arXiv 2412.17741.
    """
    side = _side(similarity, size)
    check_positive("resolution", resolution)
    height, width = size
    if points.numel() and not (
        (points >= 0).all() and (points[:, 0] < width).all() and (points[:, 1] < height).all()
    ):
        raise ValueError(f"points must lie within the picture of {width} x {height} pixels")
    # 1. The map from 0 to 1, over the whole picture.
    grid = similarity.unflatten(0, (side, side))
    low, spread = grid.amin(), grid.amax() - grid.amin()
    scaled = (grid - low) / torch.where(spread > 0, spread, 1.0)
    square = _resized(scaled, (resolution, resolution))
    around = [(length * resolution // min(size) - resolution) // 2 for length in size]
    z = _resized(F.pad(square, (around[1], around[1], around[0], around[0])), size)
    # 2. Means of pixels. The kernel is a product of one for rows and one for columns.
    weight = (z - z.detach().amax()).exp()
    px, py = points.to(weight.dtype).unbind(-1)
    right = torch.arange(width, device=z.device) - px[:, None]
    down = torch.arange(height, device=z.device) - py[:, None]
    by_column, by_row = (-right.square()).exp(), (-down.square()).exp()
    columns = (by_row @ weight) * by_column
    rows = (by_column @ weight.mT) * by_row
    dx = (columns * right).sum(-1) / columns.sum(-1)
    dy = (rows * down).sum(-1) / rows.sum(-1)
    return torch.stack([px + dx, py + dy], -1)


def _side(similarity: Tensor, size: tuple[int, int]) -> int:
    side = isqrt(similarity.numel())
    if not side or similarity.shape != (side * side,):
        raise ValueError(f"similarity has shape {tuple(similarity.shape)}, must be (side^2,)")
    if not similarity.isfinite().all():
        raise ValueError("similarity has entries that are not finite")
    check_positive("height of size", size[0])
    check_positive("width of size", size[1])
    return side


def _resized(x: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[Tensor, "i j"]:
    """Bilinear, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide[None, None], size, mode="bilinear", align_corners=False)[0, 0]
