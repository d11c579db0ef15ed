"""Dynamic attention reallocation: learned factors on the logits of image tokens, by head and image."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.checks import check_choice, check_positive
from heedful.hf.tap import Site
from heedful.registry import register
from heedful.steer.intervention import Intervention


def image_index(image: Tensor) -> Int[Tensor, "b m"]:
    """Which image a token belongs to, runs of image tokens counted from 0; -1 for text."""
    begins = image & ~nn.functional.pad(image[:, :-1], (1, 0))
    return torch.where(image, begins.cumsum(1) - 1, -1)


def reallocate(
    logits: Float[Tensor, "b h n m"],
    factors: Float[Tensor, "h i"],
    index: Int[Tensor, "b m"],
    mode: str = "multiply",
) -> Float[Tensor, "b h n m"]:
    """Scale the logits of image tokens by the factor of their head and image; text is left alone.

        s'_ij = f[h, image(j)] s_ij,   or in mode "log"  s'_ij = s_ij + log f[h, image(j)]

    Images beyond the last factor take the last. Source: arXiv 2507.15807.
    """
    known = factors[:, index.clamp(0, factors.shape[1] - 1)].transpose(0, 1)[:, :, None].to(logits.dtype)
    changed = logits * known if mode == "multiply" else logits + known.log()
    left_alone = (index < 0)[:, None, None] | (logits == -torch.inf)  # a hidden key stays hidden
    return torch.where(left_alone, logits, changed)


@register("visual-attention-reallocation", kind="steer", paper="dara", tags=("image", "learned"))
class VisualAttentionReallocation(Intervention):
    """A few learned factors that make a model look at each image more or less, in its first layer.

        s'_ij = f[h, image(j)] s_ij   for the logits of image tokens, f = 1 at the start

    heads    query heads of the model
    images   factors a head; further images take the last one
    mode     "multiply" as published; "log" adds log f, so that a larger factor always means more attention
    layer    the layer that is changed

    `factors` (heads, images) is all there is to train: freeze the model and run the loss inside the context.
    Raises ValueError if the model has another number of heads, or no known image token. Source: DARA, arXiv
    2507.15807.
    """

    def __init__(
        self, heads: int, *, images: int = 5, mode: Literal["multiply", "log"] = "multiply", layer: int = 0
    ) -> None:
        check_positive("heads", heads)
        check_positive("images", images)
        check_choice("mode", mode, ("multiply", "log"))
        self.factors = nn.Parameter(torch.ones(heads, images))
        self.mode = mode
        self.layer = layer

    @property
    def idle(self) -> bool:
        return not torch.is_grad_enabled() and bool((self.factors == 1).all())

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        heads = model.config.get_text_config(decoder=True).num_attention_heads
        if heads != self.factors.shape[0]:
            raise ValueError(f"heads is {self.factors.shape[0]}, must be {heads}, those of the model")

    def wants(self, site: Site) -> bool:
        return super().wants(site) and site.layer == self.layer

    def logits(self, site: Site, logits: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        index = image_index(self.reading.of("image_token_id", "image_token_index"))
        index = self.reading.on_keys(site, index, value=-1)
        return reallocate(logits, self.factors, index, self.mode)
