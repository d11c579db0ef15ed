"""Boosted attention to image tokens: to all of them, or to those that the vision tower points at."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from heedful.hf.tap import Site
from heedful.registry import register
from heedful.steer.intervention import Intervention
from heedful.steer.vision import ClassNotes, VisionTower, image_tokens, on_tokens


def informed_tokens(
    first: Float[Tensor, "b t"], penultimate: Float[Tensor, "b t"], *, local_ratio: float = 0.25
) -> tuple[Bool[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """The local and the summary patches of an image, by the attention of the class token to patches.

        summary = outliers:  penultimate > Q3 + 1.5 (Q3 - Q1)
        local   = the floor(local_ratio t) largest of first, without the summary

    first, penultimate  class attention of those layers, summed over heads
    Source: arXiv 2501.12206.
    """
    kept = torch.zeros_like(first, dtype=torch.bool)
    kept.scatter_(1, first.topk(int(local_ratio * first.shape[1]), dim=1).indices, True)
    low, high = penultimate.quantile(penultimate.new_tensor([0.25, 0.75]), dim=1)
    summary = penultimate > (high + 1.5 * (high - low))[:, None]
    return kept & ~summary, summary


def boost(logits: Float[Tensor, "b h n m"], coefficient: Float[Tensor, "b m"]) -> Float[Tensor, "b h n m"]:
    """Raise logits of the last query by a share of their size; a hidden key stays hidden.

    w'_j = w_j + c_j |w_j|
    """
    last = logits[:, :, -1]
    raised = last + coefficient[:, None].to(last.dtype) * last.masked_fill(last == -torch.inf, 0.0).abs()
    return torch.cat([logits[:, :, :-1], raised[:, :, None]], dim=2)


class _Boost(Intervention):
    """Boosts the last query's logits in the decoder's layers from the third on, or in those given."""

    layers: Sequence[int] | None

    def changes(self, site: Site) -> bool:
        return super().wants(site) and (site.layer >= 2 if self.layers is None else site.layer in self.layers)


@register("image-token-boost", kind="steer", paper="paint", tags=("image",), aliases=("pai",))
@dataclass(eq=False)
class ImageTokenBoost(_Boost):
    """Makes the newest token look at all image tokens more.

        w_j += alpha |w_j|   for logits w of image tokens j, last query, all heads

    alpha   0: nothing changes
    layers  changed layers of the decoder; None: all but the first two
    image   (b, m) True at image tokens of the prompt; None: found by the model's image_token_id

    Raises ValueError if the image tokens are not known. Source: PAI as generalised by arXiv 2501.12206.
    """

    alpha: float = 0.5
    layers: Sequence[int] | None = None
    image: Bool[Tensor, "b m"] | None = None

    @property
    def idle(self) -> bool:
        return self.alpha == 0.0

    def wants(self, site: Site) -> bool:
        return self.changes(site)

    def logits(self, site: Site, logits: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        image = image_tokens(self.reading, self.image)
        return boost(logits, self.reading.on_keys(site, self.alpha * image))


@register("informed-token-boost", kind="steer", paper="paint", tags=("image",), aliases=("paint",))
@dataclass(eq=False)
class InformedTokenBoost(_Boost):
    """Makes the newest token look more at image tokens that the vision tower points at.

        w_j += alpha |w_j| for local tokens,  w_j += beta |w_j| for summary tokens, last query, all heads

    The tokens are chosen by the attention of the vision tower's class token in the same forward, image by
    image (`informed_tokens`).

    alpha, beta     for local and for summary tokens; both 0: nothing changes
    local_ratio     share of an image's tokens that are local
    layers          changed layers of the decoder; None: all but the first two
    image           (b, m) True at image tokens of the prompt; None: found by the model's image_token_id
    local, summary  (b, m) the tokens themselves, for vision towers without a class token or whose patches
                    are not the image tokens; None: chosen as above

    Raises ValueError if the model does not tell what is needed and it is not given. Source: arXiv 2501.12206.
    """

    alpha: float = 0.7
    beta: float = 0.3
    local_ratio: float = 0.25
    layers: Sequence[int] | None = None
    image: Bool[Tensor, "b m"] | None = None
    local: Bool[Tensor, "b m"] | None = None
    summary: Bool[Tensor, "b m"] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.local_ratio <= 1.0:
            raise ValueError(f"local_ratio is {self.local_ratio!r}, must lie in [0, 1]")
        if (self.local is None) != (self.summary is None):
            raise ValueError("one of local and summary is given, must be both or none")
        self._class = ClassNotes()
        self._coefficient: Float[Tensor, "b m"] | None = None  # of the prompt

    @property
    def idle(self) -> bool:
        return self.alpha == self.beta == 0.0

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        self._tower = None if self.local is not None else VisionTower(model)
        self._class.clear()

    def forget(self) -> None:
        self._coefficient = None

    def wants(self, site: Site) -> bool:
        if self._tower is not None and self._tower.owns(site):
            return site.layer in (0, self._tower.layers - 2)
        return self.changes(site)

    def see(self, site: Site) -> None:
        if self._tower is not None and self._tower.owns(site):
            self._tower.check_class_token(site, "; else give the local and the summary tokens")
            weights = site.weights(slice(0, 1))
            self._class.add(site.layer, weights[:, :, 0, 1:].sum(1))

    def logits(self, site: Site, logits: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        if self._tower is not None and self._tower.owns(site):
            return logits
        if self._coefficient is None:
            self._coefficient = self._of_prompt()
        return boost(logits, self.reading.on_keys(site, self._coefficient))

    def _of_prompt(self) -> Float[Tensor, "b m"]:
        if self.local is not None and self.summary is not None:
            local = image_tokens(self.reading, self.local, "local")
            return self.alpha * local + self.beta * image_tokens(self.reading, self.summary, "summary")
        image = image_tokens(self.reading, self.image)
        if not image.any():
            return torch.zeros(image.shape, device=image.device)
        assert self._tower is not None
        first, penultimate = (self._class.of(layer) for layer in (0, self._tower.layers - 2))
        local, summary = informed_tokens(first.float(), penultimate.float(), local_ratio=self.local_ratio)
        return on_tokens(self.alpha * local + self.beta * summary, image)
