"""Bottom-up saliency of a picture, and the salient parts of a relevance map (SR map)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_positive
from heedful.registry import register

PATCH, STRIDE = 7, 3  # about half of a patch overlaps with the next
SCALES, SMALLEST = (1.0, 0.8, 0.5, 0.3), 0.2
NEIGHBOURS, NEARNESS, FOCUS = 64, 3.0, 0.8


@register("context-aware-saliency", kind="inspect", paper="salient-relevance", tags=("saliency",))
def context_aware_saliency(image: Float[Tensor, "3 h w"], *, side: int = 250) -> Float[Tensor, "h w"]:
    """How much each place of a picture stands out from all of it, in [0, 1].

    1. The picture with its longer side at `side` pixels, in CIE Lab.
    2. At scale r in {1, 0.8, 0.5, 0.3}, for the 7 x 7 patch p_i around each place,
           d(p, q) = d_colour / (1 + 3 d_position),   S_i^r = 1 - exp(-mean_k d(p_i, q_k))
       over the 64 patches q_k with the smallest d, of scales r, r / 2 and r / 4 that are at least 0.2.
       Both distances are Euclidean; colours so that black and white are 1 apart, places by the longer side.
    3. S is the mean over scales, stretched to [0, 1].
    4. Where S > 0.8 are the foci; S_i <- S_i (1 - distance to the nearest focus, by the longer side).

    image  RGB in [0, 1]
    side   smaller is faster: time grows with its fourth power

    A picture of one colour has saliency 0. Raises ValueError if its shorter side is below 7 at that size.
    Source: Goferman et al. 2012, as arXiv 1712.08268 uses it.
    """
    check_positive("side", side)
    size = tuple(max(1, round(s * side / max(image.shape[-2:]))) for s in image.shape[-2:])
    if min(size) < PATCH:
        raise ValueError(f"side is {side}, must be larger: the picture becomes {size[0]} x {size[1]} pixels")
    small = _resized(image.float(), size)
    patches: dict[float, tuple[Tensor, Tensor, tuple[int, int]]] = {}
    for scale in {r / k for r in SCALES for k in (1, 2, 4)}:
        scaled = tuple(round(s * scale) for s in size)
        if scale >= SMALLEST and min(scaled) >= PATCH:
            patches[scale] = _patches(lab(_resized(small, scaled).clamp(0, 1)))
    maps = []
    for scale in SCALES:
        if scale in patches:
            others = [patches[scale / k] for k in (1, 2, 4) if scale / k in patches]
            saliency = _standing_out(patches[scale][:2], [o[:2] for o in others])
            maps.append(_spread(saliency.view(patches[scale][2]), scale, size))
    mean = torch.stack(maps).mean(0)
    mean = (mean - mean.amin()) / (mean.amax() - mean.amin()).clamp(min=1e-6)
    return _resized((mean * _attended(mean))[None], tuple(image.shape[-2:]))[0].clamp(0, 1)


@register(
    "salient-relevance-map", kind="inspect", paper="salient-relevance", tags=("attribution", "saliency")
)
def salient_relevance_map(relevance: Float[Tensor, "3 h w"], *, side: int = 250) -> Float[Tensor, "h w"]:
    """The context-aware saliency of a heat map: the areas a network attends to, without scattered pixels.

    relevance  of the colours of one picture, as `lrp_cnn` gives it; |R| stretched to [0, 1] is the heat map

    Source: arXiv 1712.08268.
    """
    heat = relevance.abs()
    heat = (heat - heat.amin()) / (heat.amax() - heat.amin()).clamp(min=torch.finfo(heat.dtype).tiny)
    return context_aware_saliency(heat, side=side)


def lab(rgb: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
    """CIE Lab (white D65) of sRGB in [0, 1]: L from 0 to 100, a and b about -100 to 100."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = rgb.new_tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = torch.einsum("ij,jhw->ihw", to_xyz / to_xyz.sum(1, keepdim=True), linear)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-12) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _patches(colours: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """All patches as vectors, 1 apart from black to white, where their middles are, and the grid."""
    height, width = colours.shape[1:]
    vectors = F.unfold(colours[None], PATCH, stride=STRIDE)[0].T / (100 * PATCH)
    grid = tuple((s - PATCH) // STRIDE + 1 for s in (height, width))
    y, x = ((torch.arange(g) * STRIDE + PATCH / 2).to(colours) for g in grid)
    return vectors, torch.cartesian_prod(y, x) / max(height, width), (grid[0], grid[1])


def _standing_out(own: tuple[Tensor, Tensor], others: list[tuple[Tensor, Tensor]]) -> Tensor:
    colours, places = (torch.cat(x) for x in zip(*others, strict=True))
    middle = colours.mean(0)  # away from it distances would drown in rounding
    colours = colours - middle
    count, means = min(NEIGHBOURS, len(colours)), []
    for colour, place in zip((own[0] - middle).split(512), own[1].split(512), strict=True):
        d = torch.cdist(colour, colours) / (1 + NEARNESS * torch.cdist(place, places))
        means.append(d.topk(count, largest=False).values.mean(1))
    return 1 - torch.exp(-torch.cat(means))


def _spread(table: Tensor, scale: float, size: tuple[int, ...]) -> Tensor:
    """From the middles of patches to all pixels, bilinearly; beyond the outermost ones it stays."""
    grid = []
    for pixels, places in zip(size, table.shape, strict=True):
        at = ((torch.arange(pixels).to(table) + 0.5) * scale - PATCH / 2) / STRIDE  # in places of the table
        grid.append(2 * (at + 0.5) / places - 1)
    y, x = torch.meshgrid(*grid, indexing="ij")
    where = torch.stack([x, y], dim=-1)[None]
    return F.grid_sample(table[None, None], where, padding_mode="border", align_corners=False)[0, 0]


def _attended(saliency: Tensor) -> Tensor:
    """1 less the distance to the nearest focus."""
    foci = (saliency > FOCUS).nonzero().to(saliency)
    if not len(foci):
        return torch.ones_like(saliency)
    places = torch.cartesian_prod(*(torch.arange(s).to(saliency) for s in saliency.shape))
    near = torch.cat([torch.cdist(rows, foci).amin(1) for rows in places.split(4096)])
    return 1 - (near / max(saliency.shape)).view(saliency.shape)
