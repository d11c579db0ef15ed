"""Logits of two streams: the model's own, and those it has for a changed prompt."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.hf.cache_name import CACHE, with_cache
from heedful.hf.tap import Handler, Site, alone
from heedful.registry import register
from heedful.steer.intervention import Intervention
from heedful.steer.vision import as_given, image_tokens, without


def plausible(logits: Float[Tensor, "*b v"], beta: float) -> Bool[Tensor, "*b v"]:
    """Tokens with at least beta times the probability of the most probable one."""
    if beta == 0.0:
        return torch.ones_like(logits, dtype=torch.bool)
    return logits >= logits.amax(-1, keepdim=True) + math.log(beta)


def contrast(
    logits: Float[Tensor, "*b v"], other: Float[Tensor, "*b v"], alpha: float, beta: float
) -> Float[Tensor, "*b v"]:
    """z = (1 + alpha) l - alpha l'; -inf where l < log(beta) + max l."""
    return ((1 + alpha) * logits - alpha * other).masked_fill(~plausible(logits, beta), -torch.inf)


class ContrastiveLogits(Intervention):
    """Reads a changed prompt beside the model's own, and joins the logits of both, step by step.

        z = (1 + alpha) l - alpha l';   z = -inf where l < log(beta) + max l

    The other stream has a cache of its own and sees no other intervention; both go on with the tokens that
    are generated from z. Beam search reorders both caches.

    A subclass gives `other`, and where it needs to `combine` and `handlers`. If `own_tokens`, its prompt has
    other tokens than the model's, and only the logits of the last position are joined.

    alpha  0: nothing changes but for the cut
    beta   of the cut; 0: no token is cut
    """

    alpha: float
    beta: float
    own_tokens: ClassVar[bool] = False

    def other(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the other stream is given for the prompt, where the model is given `inputs`."""
        raise NotImplementedError

    def combine(self, logits: Float[Tensor, "*b v"], other: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
        """The logits of both streams, joined."""
        return contrast(logits, other, self.alpha, self.beta)

    def handlers(self) -> tuple[Handler, ...]:
        """What acts on the other stream."""
        return ()

    @property
    def idle(self) -> bool:
        return self.alpha == self.beta == 0.0

    def wants(self, site: Site) -> bool:
        return False

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta is {self.beta!r}, must lie in [0, 1]")
        stack.callback(model.register_forward_hook(self._join, with_kwargs=True).remove)

    def forget(self) -> None:
        self._begun, self._cache = False, None
        self._mask: Tensor | None = None

    def _join(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        inputs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
        logits = getattr(output, "logits", None)
        if logits is None:
            raise ValueError(f"{type(model).__name__} gives no logits, must give some, with return_dict=True")
        main = getattr(output, CACHE, None)
        if not self._begun:
            inputs = {**inputs, "attention_mask": as_given(inputs.get("attention_mask"), self.reading.ids)}
        given = self._continued(inputs) if self._begun else self.other(inputs)
        if main is not None:
            given = {**with_cache(given, self._cache), "use_cache": True}
        with alone(self.model, *self.handlers()):
            found = self.model.forward(**{**given, "return_dict": True})
        if not self._begun:
            self._begin(main, found, given)
        other = found.logits.to(logits.device)
        if self.own_tokens:
            last = self.combine(logits[:, -1:], other[:, -1:])
            output.logits = torch.cat([logits[:, :-1], last], dim=1)
        else:
            output.logits = self.combine(logits, other)
        return output

    def _begin(self, main: Any, found: Any, given: dict[str, Any]) -> None:
        self._begun = True
        self._mask = given.get("attention_mask")
        if main is None:
            return
        self._cache = getattr(found, CACHE)
        reorder = main.reorder_cache

        def both(index: Tensor) -> None:
            reorder(index)
            if self._cache is not None:
                self._cache.reorder_cache(index)
                self._mask = None if self._mask is None else self._mask[index.to(self._mask.device)]

        main.reorder_cache = both  # of this cache alone

    def _continued(self, inputs: dict[str, Any]) -> dict[str, Any]:
        mask = inputs.get("attention_mask")
        if not self.own_tokens and (mask is None or isinstance(mask, Tensor)):
            return inputs
        assert self._mask is not None
        ids = inputs["input_ids"]
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        if not self.own_tokens:  # a mask for the places of a static cache, which the other stream has not
            return {**inputs, "attention_mask": self._mask}
        places = (self._mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        return {"input_ids": ids, "attention_mask": self._mask, "position_ids": places}


@register("image-free-contrast", kind="steer", paper="paint", tags=("image", "decoding"))
@dataclass(eq=False)
class ImageFreeContrast(ContrastiveLogits):
    """Prefers tokens that the image makes more probable: the other stream has the prompt without it.

        z = (1 + alpha) l - alpha l(without image);   z = -inf where l < log(beta) + max l

    alpha  gamma - 1 of the paper; 0: nothing changes but for the cut
    beta   of the cut; 0: no token is cut
    image  (b, m) True at image tokens of the prompt; None: found by the model's image_token_id

    Raises ValueError if the image tokens are not known. Source: PAI as used in arXiv 2501.12206.
    """

    alpha: float = 0.1
    beta: float = 0.1
    image: Bool[Tensor, "b m"] | None = None
    own_tokens: ClassVar[bool] = True

    def other(self, inputs: dict[str, Any]) -> dict[str, Any]:
        image = image_tokens(self.reading, self.image)
        ids, mask = without(image, self.reading.ids, inputs.get("attention_mask"))
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
