"""Assembly of global and local attention: the logits of an image and of what matters in it, added."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.registry import register
from heedful.steer.contrastive import ContrastiveLogits, plausible
from heedful.steer.vision import image_tokens


def assemble(
    logits: Float[Tensor, "*b v"], other: Float[Tensor, "*b v"], alpha: float, beta: float
) -> Float[Tensor, "*b v"]:
    """z = l + alpha l'; -inf where l < log(beta) + max l."""
    return (logits + alpha * other).masked_fill(~plausible(logits, beta), -torch.inf)


def prompt_relevance(
    attention: Float[Tensor, "b h n m"],
    gradient: Float[Tensor, "b h n m"],
    mask: Int[Tensor, "b n"],
    grid: tuple[int, int],
) -> Float[Tensor, "b rows columns"]:
    """Where a text finds itself in an image, by the cross-attention of an image-text matching model.

        cam_t = mean over heads of C_t clamp(G_t, min=0);   the mean of cam_t over tokens 1 .. sum(mask) - 2

    attention, gradient  cross-attention of one layer and the gradient of the matching score to it; the first
                         image token is a class token
    mask                 of the text, whose first and last token do not count
    Source: AGLA, arXiv 2406.12718.
    """
    cam = (attention * gradient.clamp_min(0.0))[..., 1:].mean(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    words = mask.sum(1, keepdim=True) - 2
    counted = (place >= 1) & (place <= words) & mask.bool()
    total = (cam * counted[..., None]).sum(1) / words.clamp_min(1)
    return total.unflatten(-1, grid)


def _unit(x: Float[Tensor, "b height width"]) -> Float[Tensor, "b height width"]:
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


def smooth_map(
    relevance: Float[Tensor, "b rows columns"], size: tuple[int, int], *, sigma: float | None = None
) -> Float[Tensor, "b height width"]:
    """A map of relevance in [0, 1] in the image's pixels: resized, blurred, and stretched to [0, 1] again.

    size   (height, width)
    sigma  of the Gaussian, in pixels; None: 0.02 of the height
    Source: AGLA, arXiv 2406.12718.
    """
    big = F.interpolate(_unit(relevance)[:, None], size, mode="bicubic", align_corners=False)
    sigma = 0.02 * size[0] if sigma is None else sigma
    if sigma > 0:
        reach = max(1, round(4 * sigma))
        place = torch.arange(-reach, reach + 1, dtype=big.dtype, device=big.device)
        kernel = (-0.5 * (place / sigma) ** 2).exp()
        kernel = kernel / kernel.sum()
        big = F.conv2d(F.pad(big, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None])
        big = F.conv2d(F.pad(big, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None])
    return _unit(big[:, 0])


def relevance_mask(
    relevance: Float[Tensor, "b height width"], similarity: Float[Tensor, " b"]
) -> Bool[Tensor, "b height width"]:
    """The pixels that are kept: the more alike image and prompt are, the fewer.

        r = min(1 - s / 2, 1 - 1e-5);   kept: map >= its value at index int(height width r), sorted descending

    similarity  cosine of image and prompt
    Source: AGLA, arXiv 2406.12718.
    """
    flat = relevance.flatten(1)
    ratio = (1 - similarity.double() / 2).clamp(0.0, 1 - 1e-5)
    index = (flat.shape[1] * ratio).long()
    threshold = flat.sort(dim=1, descending=True).values.gather(1, index[:, None].to(flat.device))
    return (flat >= threshold).view_as(relevance)


@register("assembly-decoding", kind="steer", paper="agla", tags=("image", "decoding"), aliases=("agla",))
@dataclass(eq=False)
class AssemblyDecoding(ContrastiveLogits):
    """Adds the logits that the model has for an image reduced to what the prompt is about.

        z = l + alpha l(reduced);   z = -inf where l < log(beta) + max l

    pixels  the reduced images in place of the model's pixel_values, of the same shape; for `generate` with
            models that are told more of images (image_grid_thw, image_sizes) a dict with all of it. They are
            the images times `relevance_mask`, then the model's own preprocessing; where the relevance comes
            from is up to the caller (`prompt_relevance` for an image-text matching model)
    alpha   0: nothing changes but for the cut
    beta    of the cut; 0: no token is cut

    Raises ValueError if the model is given no images, or others in number or shape. Source: AGLA, arXiv
    2406.12718.
    """

    pixels: Float[Tensor, "..."] | dict[str, Tensor]
    alpha: float = 2.0
    beta: float = 0.5

    def combine(self, logits: Float[Tensor, "*b v"], other: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
        return assemble(logits, other, self.alpha, self.beta)

    def other(self, inputs: dict[str, Any]) -> dict[str, Any]:
        images = {"pixel_values": self.pixels} if isinstance(self.pixels, Tensor) else self.pixels
        given, encoded = inputs.get("pixel_values"), (inputs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            images = self._for_beams(images, [len(tokens) for tokens in encoded.pooler_output])
        elif given is None:
            raise ValueError("the model is given no pixel_values, must be given the images")
        else:
            shape = images["pixel_values"].shape
            beams = max(given.shape[0] // shape[0], 1)
            images = {name: x.repeat_interleave(beams, dim=0) for name, x in images.items()}
            if given.shape != images["pixel_values"].shape:
                raise ValueError(
                    f"pixels has shape {tuple(shape)}, must have that of the model's pixel_values, "
                    f"{tuple(given.shape)}"
                )
        rest = {name: value for name, value in inputs.items() if name != "mm_encoder_outputs"}
        return {**rest, **images}

    def _for_beams(self, images: dict[str, Tensor], tokens: list[int]) -> dict[str, Tensor]:
        """The images as often as `generate`, which has encoded its own, has them.

        tokens  of each image that it has: those of a sample, in order, for each of its beams in turn
        """
        told = inspect.signature(self.model.base_model.get_image_features).parameters  # type: ignore[arg-type]
        needed = [
            name
            for name, p in told.items()
            if name == "image_grid_thw" or (p.default is p.empty and p.kind is not p.VAR_KEYWORD)
        ]
        missing = [name for name in needed if name not in images]
        if missing:
            raise ValueError(f"pixels has no {', '.join(missing)}, must be a dict with it for `generate`")
        pixels, grids = images["pixel_values"], images.get("image_grid_thw")
        sizes = [1] * len(pixels) if grids is None else grids.prod(-1).tolist()  # in rows of pixels
        beams, over = divmod(len(tokens), len(sizes))
        if over or not beams:
            raise ValueError(f"pixels holds {len(sizes)} images, must hold all those of the prompt")
        if beams == 1:
            return images
        rows = image_tokens(self.reading, None).sum(1).cumsum(0)
        row = torch.searchsorted(rows, torch.tensor(tokens, device=rows.device).cumsum(0))
        count = row.bincount(minlength=len(rows))[::beams].tolist()  # images of each sample
        samples = torch.arange(len(sizes)).split(count)
        order = torch.cat([sample for sample in samples for _ in range(beams)])
        parts = pixels.split(sizes)
        rest = {name: x[order.to(x.device)] for name, x in images.items() if name != "pixel_values"}
        return {**rest, "pixel_values": torch.cat([parts[i] for i in order])}
