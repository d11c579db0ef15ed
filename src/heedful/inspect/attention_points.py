"""From a vision-language model's attention to points that prompt a segmenter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.inspect.site import Site
from heedful.registry import register


@register("regularized-attention-flow", kind="inspect", paper="vl-sam", tags=("rollout", "image"))
class RegularizedAttentionFlow:
    """Attention of a causal model through all layers, kept from collapsing onto the first tokens.

        S'_l = mean_h W_lh S_lh,             W_lh = mean_i max_j S_lh[i, j]
        R_1 = S'_1 D,   R_l = (I + S'_l)(I + R_{l-1}) D,   D_jj = 1 - (c_j - 1) / c

    c_j is how many queries may see key j, c the most that see one: c_j = n - j and c = n for n tokens behind
    a causal mask, so that D goes from 1/n at the first token to 1 at the last.

    Feed it the layers of the language model in order, as `see` of `capture`, in one pass over the prompt and
    the answer, without a cache; one table is kept, whatever the depth. `table` is R; the row of a word of the
    answer says where in the image that word came from (`map`).

    The published name is attention flow; it is a product of matrices and no maximum flow.
    Source: Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts,
    arXiv 2410.05963.
    """

    def __init__(self) -> None:
        self.table: Float[Tensor, "b n n"] | None = None

    def add(self, weights: Float[Tensor, "b h n n"], visible: Bool[Tensor, "*c n n"] | None = None) -> None:
        """One layer more; visible: who may see whom, by default each token itself and those before."""
        n = weights.shape[-1]
        eye = torch.eye(n, dtype=weights.dtype, device=weights.device)
        if visible is None:
            visible = torch.ones(1, 1, n, n, dtype=torch.bool, device=weights.device).tril()
        if self.table is not None and self.table.shape[1] != n:
            raise ValueError(f"weights are of {n} tokens, must be of {self.table.shape[1]} as before")
        # 1. The weight of a head: how pointed its rows are. Rows of padding see nothing and do not count.
        rows = visible.any(-1).sum(-1).clamp(min=1)
        head = weights.amax(-1).sum(-1) / rows
        # 2. The heads as one.
        fused = (head[..., None, None] * weights).mean(1)
        # 3. What came from below, and what stays where it is.
        table = fused if self.table is None else (eye + fused) @ (eye + self.table)
        # 4. Early keys are seen by more queries.
        seen = visible.sum(-2)[:, 0].to(weights.dtype)
        self.table = table * (1 - (seen - 1) / seen.amax(-1, keepdim=True).clamp(min=1))[:, None]

    def __call__(self, site: Site) -> None:
        if site.cross:
            return
        if site.shape[2] != site.shape[3]:
            raise ValueError(
                f"{site.name} has {site.shape[2]} queries for {site.shape[3]} keys; run all at once"
            )
        self.add(site.weights().float(), site.visible())

    def map(
        self, token: int, image: slice | Int[Tensor, " m"], grid: tuple[int, int], size: tuple[int, int]
    ) -> Float[Tensor, "b height width"]:
        """Where in the image a token came from, from 0 to 1.

        token  the position of the object's last sub-token
        image  the positions of the image tokens, row by row of the grid
        grid   (height, width) in patches
        size   (height, width) of the map, in pixels; made bilinearly

        A row that is the same everywhere gives zeros. ValueError before the first layer.
        """
        if self.table is None:
            raise ValueError("no layer was added yet")
        patches = self.table[:, token, image].unflatten(-1, grid)
        low, high = patches.amin((-2, -1), keepdim=True), patches.amax((-2, -1), keepdim=True)
        scaled = (patches - low) / (high - low).clamp(min=torch.finfo(patches.dtype).tiny)
        return F.interpolate(scaled[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def regularized_attention_flow(layers: Iterable[Float[Tensor, "b h n n"]]) -> Float[Tensor, "b n n"]:
    """`RegularizedAttentionFlow` of the weights of each layer, first to last, behind a causal mask."""
    flow = RegularizedAttentionFlow()
    for weights in layers:
        flow.add(weights)
    if flow.table is None:
        raise ValueError("layers is empty, must hold the weights of at least one layer")
    return flow.table


class PointPrompts(NamedTuple):
    """Two points (x, y), as segmenters take them, and the area of the first."""

    positive: tuple[int, int]
    negative: tuple[int, int]
    area: Bool[Tensor, "height width"]


@register("attention-points", kind="inspect", paper="vl-sam", tags=("image", "prompt"))
def attention_to_points(attention: Float[Tensor, "height width"], *, threshold: float = 0.5) -> PointPrompts:
    """A point on the object and one beside it, from a map of attention.

    The area is the largest piece of what exceeds `threshold` times the maximum, neighbours by edge or corner;
    the positive point is the maximum in it, the negative one the minimum outside. The first in reading order
    is taken of several; of equal pieces the one that ends first.

    threshold  ours; from 0 up to but not 1

    Both go to a segmenter together, with labels 1 and 0. To refine, hand its mask back to it as a prompt, or
    ask again with the map times the mask. ValueError for a map that is nowhere positive, not finite, or all
    of it above the threshold. Source: arXiv 2410.05963.
    """
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold is {threshold}, must lie in [0, 1)")
    if not attention.isfinite().all() or not (attention > 0).any():
        raise ValueError("attention has no positive maximum, or is not finite")
    area = largest_component(attention > threshold * attention.max())
    if area.all():
        raise ValueError(
            "attention exceeds the threshold everywhere, so that there is no place for a negative point"
        )
    width = attention.shape[1]
    high = int(attention.masked_fill(~area, -torch.inf).argmax())
    low = int(attention.masked_fill(area, torch.inf).argmin())
    return PointPrompts((high % width, high // width), (low % width, low // width), area)


def largest_component(mask: Bool[Tensor, "height width"]) -> Bool[Tensor, "height width"]:
    """The largest piece of a mask whose places touch by an edge or a corner."""
    # Each place takes the largest number around it until its whole piece has one.
    number = (
        torch.arange(1, mask.numel() + 1, dtype=torch.float64, device=mask.device).view(mask.shape) * mask
    )
    while True:
        spread = F.max_pool2d(number[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(spread, number):
            break
        number = spread
    sizes = torch.bincount(number.long().flatten(), minlength=2)
    sizes[0] = 0
    return mask & (number == sizes.argmax())
