"""Contrastive attention crop: an image reduced to what a question, unlike a general one, looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from heedful.checks import check_choice
from heedful.hf.tap import Handler, Site, tap
from heedful.inspect.visual_contrast import contrast_attention
from heedful.registry import register
from heedful.steer.intervention import Reading, token_id

Array = np.ndarray


def answer_attention(
    model: PreTrainedModel, inputs: dict[str, Any], **generation: Any
) -> Float[Tensor, "t l n"]:
    """The attention to image tokens while a model answers greedily: by step and layer, the mean over heads.

    inputs      of one sample, as for `model.generate`
    generation  arguments of `generate`; max_new_tokens is 32 unless given

    Weights are those of the last position, not normalised again. Raises ValueError for several samples, or if
    the image tokens are not known.
    """
    steps: list[list[Tensor]] = []
    reading = Reading(model)

    class Look(Handler):
        def wants(self, site: Site) -> bool:
            return not site.cross and reading.is_decoder(site)

        def see(self, site: Site) -> None:
            image = reading.of("image_token_id", "image_token_index")
            if image.shape[0] != 1:
                raise ValueError(f"inputs holds {image.shape[0]} samples, must hold one")
            row = site.weights(slice(site.query.shape[2] - 1, None))[0, :, 0].mean(0)
            if site.layer == 0:
                steps.append([])
            first = reading.first_key(site)  # tokens before it have left a sliding cache
            row = torch.nn.functional.pad(row, (first, 0))[: image.shape[1]]
            steps[-1].append(row[image[0]].float())

    with torch.no_grad(), reading.follow(lambda: None), tap(model, Look()):
        model.generate(  # type: ignore[operator]
            **inputs, **{"max_new_tokens": 32, "do_sample": False, **generation}
        )
    return torch.stack([torch.stack(step) for step in steps])


def token_grid(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of the tokens of the one image that a model is given.

    Read from image_grid_thw and the vision tower's spatial_merge_size where the model is given them, else the
    square of its image tokens. Raises ValueError for several images, and for tokens that make no square.
    """
    grids = inputs.get("image_grid_thw")
    if grids is None:
        marked = inputs["input_ids"] == token_id(model, "image_token_id", "image_token_index")
        return _square(int(marked.sum()))
    if len(grids) != 1:
        raise ValueError(f"image_grid_thw tells of {len(grids)} images, must tell of one")
    merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
    _, rows, columns = grids[0].tolist()
    return rows // merge, columns // merge


def _square(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"grid is not known, must be given as (rows, columns): the {tokens} image tokens make no square"
        )
    return side, side


def fuse_contrast(
    question: Float[Tensor, "t l n"],
    general: Float[Tensor, "s l n"],
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    layers: Sequence[int] = range(20, 26),
    ridge: float = 1e-8,
    first_step: bool = False,
) -> Float[Array, "height width"]:
    """The contrast of two answers' attention, in the image's pixels.

        S = sum_t (t + 1) sum_l resize(question[t, l] / (general[t, l] + ridge))

    over the steps that both have, paired by index, and the chosen layers.

    grid        (rows, columns) of image tokens
    size        (width, height) of the image
    first_step  whether the first step counts alone

    Source: CARVE, arXiv 2509.06461.
    """
    if grid[0] * grid[1] != question.shape[2]:
        raise ValueError(f"grid is {grid}, must hold the {question.shape[2]} image tokens")
    known = min(question.shape[1], general.shape[1])
    if not all(0 <= layer < known for layer in layers):
        raise ValueError(f"layers is {layers}, must name layers of the {known} there are")
    steps = 1 if first_step else min(len(question), len(general))
    fused = np.zeros((size[1], size[0]))
    for t in range(steps):
        for layer in layers:
            ratio = contrast_attention(question[t, layer], general[t, layer], ridge)
            map_ = Image.fromarray(ratio.reshape(grid).float().cpu().numpy())
            fused += (t + 1) * np.asarray(map_.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    return fused


def components(mask: Array) -> tuple[Int[Array, "height width"], int]:
    """Numbers the regions of a mask that are connected by edges, from 1 on, and says how many there are."""
    labels, count = np.zeros(mask.shape, dtype=np.int64), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        labels[start], stack = count, [start]
        while stack:
            y, x = stack.pop()
            for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]
                if inside and mask[place] and not labels[place]:
                    labels[place] = count
                    stack.append(place)
    return labels, count


def region_mask(
    fused: Float[Array, "height width"],
    *,
    share: float = 0.2,
    regions: int = 3,
    rank: str = "attention",
    least_percent: float = 0.1,
) -> Array:
    """The regions of a map that matter, as a boolean mask.

    The largest `share` of the pixels falls apart into regions. By rank "attention" (sum of the map inside) or
    "size" the best max(regions, int(share number of regions)) stay; by "large" all of at least least_percent
    percent of the image's pixels. Source: CARVE, arXiv 2509.06461.
    """
    check_choice("rank", rank, ("attention", "size", "large"))
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share!r}, must lie in (0, 1]")
    labels, count = components(fused >= np.percentile(fused, (1 - share) * 100))
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if rank == "large":
        kept = np.nonzero(area >= int(fused.size * least_percent / 100))[0]
    else:
        sums = np.bincount(labels.ravel(), fused.ravel(), minlength=count + 1)[1:]
        best = np.argsort(-(sums if rank == "attention" else area), kind="stable")
        kept = best[: max(regions, int(count * share))]
    return np.isin(labels, kept + 1)


def bounding_box(mask: Array) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what is True, right and bottom beyond it; all of an empty mask."""
    if not mask.any():
        return 0, 0, mask.shape[1], mask.shape[0]
    rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@register("contrastive-attention-crop", kind="steer", paper="carve", tags=("image", "training-free"))
def contrastive_attention_crop(
    image: Image.Image,
    question: Float[Tensor, "t l n"],
    general: Float[Tensor, "s l n"],
    *,
    grid: tuple[int, int] | None = None,
    layers: Sequence[int] = range(20, 26),
    share: float = 0.2,
    regions: int = 3,
    rank: str = "attention",
    first_step: bool = False,
) -> Image.Image:
    """An image reduced to the regions that a question looks at more than a general instruction does.

    question, general  attention to image tokens while the model answers either (`answer_attention`)
    grid               (rows, columns) of image tokens, see `token_grid`; None: a square

    Other pixels become black, the rest is cropped and enlarged until neither side is shorter than before. The
    authors answer again with the image and this one. See `fuse_contrast` and `region_mask`.
    Raises ValueError if grid is None and the tokens make no square. Source: CARVE, arXiv 2509.06461.
    """
    if grid is None:
        grid = _square(question.shape[2])
    fused = fuse_contrast(question, general, grid=grid, size=image.size, layers=layers, first_step=first_step)
    mask = region_mask(fused, share=share, regions=regions, rank=rank)
    pixels = np.asarray(image)
    dark = Image.fromarray(pixels * (mask[..., None] if pixels.ndim == 3 else mask).astype(pixels.dtype))
    part = dark.crop(bounding_box(mask))
    scale = max(image.width / part.width, image.height / part.height)
    return part.resize((int(part.width * scale), int(part.height * scale)), Image.Resampling.LANCZOS)
