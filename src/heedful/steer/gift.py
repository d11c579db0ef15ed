"""Gaze shift guidance: what the question's words made the model look at is looked at more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.hf.cache_name import with_cache
from heedful.hf.tap import Handler, Site, alone
from heedful.registry import register
from heedful.steer.intervention import Intervention
from heedful.steer.vision import as_given, for_beams, image_tokens

# (model type, layers): saliency layers, enhanced layers, alpha of the paper
PUBLISHED: dict[tuple[str, int], tuple[Sequence[int], Sequence[int], float]] = {
    ("llava", 32): ((11,), range(12, 23), 5.0),
    ("llava", 40): ((10,), range(14, 21), 5.0),
    ("qwen2_vl", 28): ((14,), range(5, 19), 4.0),
}
Tokens = Bool[Tensor, "b m"] | Callable[[Int[Tensor, "b m"]], Bool[Tensor, "b m"]]


def half_of_heads(sums: Float[Tensor, "b h"]) -> Bool[Tensor, "b h"]:
    """The floor(h / 2) heads with the largest sums."""
    chosen = torch.zeros_like(sums, dtype=torch.bool)
    return chosen.scatter_(1, sums.topk(sums.shape[1] // 2, dim=1).indices, True)


def gaze_shift(
    weights: Sequence[Float[Tensor, "b h n m"]], image: Bool[Tensor, "b m"], content: Bool[Tensor, "b n"]
) -> Float[Tensor, "b m"]:
    """By how much attention to each image token rises at content words: the mean over layers, heads, words.

        D_ij = max(0, a_ij - a_(i-1)j)   for content words i, image tokens j

    Of each layer the half of the heads counts whose D is largest in sum.

    weights  of the chosen layers
    content  True at words that count; the first token of a sequence never does
    Zeros at text, and in rows without content words. Source: arXiv 2510.22067.
    """
    content = content.clone()
    content[:, 0] = False
    words = content.sum(1).clamp_min(1)
    total = torch.zeros_like(image, dtype=torch.float32)
    for a in weights:
        rise = torch.nn.functional.pad((a[:, :, 1:] - a[:, :, :-1]).float().clamp_min(0.0), (0, 0, 1, 0))
        rise = (rise * (content[:, None, :, None] & image[:, None, None])).sum(2)
        heads = half_of_heads(rise.sum(-1))
        total += (rise * heads[..., None]).sum(1) / heads.sum(1).clamp_min(1)[:, None]
    return total / words[:, None] / len(weights)


def amplification(
    shift: Float[Tensor, "b m"], image: Bool[Tensor, "b m"], alpha: float
) -> Float[Tensor, "b m"]:
    """Factors in [1, e^alpha] for image tokens; 1 at text.

        S = exp(alpha minmax(clip(m, mean - 3 std, mean + 3 std)))   over the image's tokens

    The deviation is the unbiased one. A map that is constant gives 1. Source: arXiv 2510.22067.
    """
    factors = torch.ones_like(shift)
    for row, (m, where) in enumerate(zip(shift, image, strict=True)):
        if int(where.sum()) < 2:
            continue
        seen = m[where]
        spread = 3 * seen.std()
        seen = seen.clamp(seen.mean() - spread, seen.mean() + spread)
        low, high = seen.aminmax()
        if high > low:
            factors[row, where] = (alpha * (seen - low) / (high - low)).exp()
    return factors


def enhance(
    weights: Float[Tensor, "b h n m"],
    factors: Float[Tensor, "b m"],
    image: Bool[Tensor, "b m"],
    question: Bool[Tensor, "b m"],
) -> Float[Tensor, "b h n m"]:
    """Amplify the last query's weights, on the image and in proportion on the question; rows sum to 1 again.

        Hv = half of the heads with most weight on the image:     a_j <- S_j a_j at image tokens
        g  = that weight of Hv after and before, as a ratio, over all its heads
        Hq = half of the heads with most weight on the question:  a_k <- g a_k at question tokens

    Computed in float32 at least. Source: arXiv 2510.22067.
    """
    last = weights[:, :, -1].to(torch.promote_types(weights.dtype, torch.float32))
    image, question = image[:, None], question[:, None]
    seen = (last * image).sum(-1)
    vision = half_of_heads(seen)[..., None]
    a = torch.where(vision & image, last * factors[:, None], last)
    old, new = ((x * image * vision).sum((1, 2)) for x in (last, a))
    gain = torch.where(old > 0, new / old.clamp_min(torch.finfo(old.dtype).tiny), 1.0)
    asked = half_of_heads((last * question).sum(-1))[..., None]
    a = torch.where(asked & question, a * gain[:, None, None], a)
    changed = (vision | asked)[..., 0]
    a = torch.where(
        changed[..., None], a / a.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny), last
    )
    return torch.cat([weights[:, :, :-1], a[:, :, None].to(weights.dtype)], dim=2)


class _Recorder(Handler):
    """Keeps the weights of some layers of a forward."""

    def __init__(self, owner: GazeShiftGuidance) -> None:
        self.owner = owner
        self.found: list[Float[Tensor, "b h n m"]] = []

    def wants(self, site: Site) -> bool:
        return Intervention.wants(self.owner, site) and site.layer in self.owner._saliency_layers

    def see(self, site: Site) -> None:
        self.found.append(site.weights())


@register("gaze-shift-guidance", kind="steer", paper="gift", tags=("image",), aliases=("gift",))
@dataclass(eq=False)
class GazeShiftGuidance(Intervention):
    """Looks more at image tokens that attention moved to when the model read the question's content words.

    The prompt is read once more beforehand, which shows how attention rises (`gaze_shift`, `amplification`).
    Then the newest token's weights on the image are amplified in one half of the heads, those on the
    question in another (`enhance`).

    content          (b, m) True at the question's content words (nouns, verbs, adjectives, adverbs, numbers),
                     or a function that gives this for the prompt's ids
    alpha            0: nothing changes; None: the paper's for the model
    saliency_layers  layers in which attention is looked at; None: the paper's for the model
    enhance_layers   layers that are changed; None: the paper's for the model
    image            (b, m) True at image tokens of the prompt; None: found by the model's image_token_id
    question         (b, m) True at the question; None: the text after the last image token

    Raises ValueError if the paper has no settings for the model and they are not given. Source: GIFT, arXiv
    2510.22067.
    """

    content: Tokens
    alpha: float | None = None
    saliency_layers: Sequence[int] | None = None
    enhance_layers: Sequence[int] | None = None
    image: Bool[Tensor, "b m"] | None = None
    question: Bool[Tensor, "b m"] | None = None

    def __post_init__(self) -> None:
        self._prompt: tuple[Tensor, Tensor, Tensor] | None = None  # factors, image, question

    @property
    def idle(self) -> bool:
        return self.alpha == 0.0

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        key = (model.config.model_type, self.reading.layers)
        known = PUBLISHED.get(key, (None, None, None))
        saliency = known[0] if self.saliency_layers is None else self.saliency_layers
        enhanced = known[1] if self.enhance_layers is None else self.enhance_layers
        alpha = known[2] if self.alpha is None else self.alpha
        if saliency is None or enhanced is None or alpha is None:
            raise ValueError(
                f"saliency_layers is {saliency}, enhance_layers is {enhanced}, alpha is {alpha}; all must be "
                f"given, because the paper has none for a {key[0]!r} of {key[1]} layers"
            )
        self._saliency_layers, self._enhanced, self._alpha = saliency, enhanced, alpha
        hook = model.register_forward_pre_hook(self._look, with_kwargs=True)
        stack.callback(hook.remove)

    def forget(self) -> None:
        self._prompt = None

    def wants(self, site: Site) -> bool:
        return super().wants(site) and site.layer in self._enhanced

    def _look(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """At the prompt: read it once, as the model does without interventions, and note what is to do."""
        if self._prompt is not None:
            return
        ids = self.reading.ids
        image = image_tokens(self.reading, self.image)
        content = self.content(ids) if callable(self.content) else for_beams(self.content, ids.shape[0])
        if content.shape != ids.shape or content.dtype != torch.bool:
            raise ValueError(
                f"content has shape {tuple(content.shape)} and dtype {content.dtype}, must be a bool tensor "
                f"of shape {tuple(ids.shape)}"
            )
        place = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(image, place, -1).amax(-1, keepdim=True)
        if self.question is None:
            question = (place > last) & (last >= 0)
        else:
            question = image_tokens(self.reading, self.question, "question")
        recorder = _Recorder(self)
        plain = {**with_cache(kwargs, None), "use_cache": False}
        plain["attention_mask"] = as_given(kwargs.get("attention_mask"), ids)
        with torch.no_grad(), alone(self.model, recorder):
            self.model.forward(*args, **plain)
        shift = gaze_shift(recorder.found, image, content.to(ids.device))
        self._prompt = amplification(shift, image, self._alpha), image, question

    def weights(self, site: Site, weights: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        assert self._prompt is not None
        factors, image, question = self._prompt
        image, question = (self.reading.on_keys(site, x) for x in (image, question))
        return enhance(weights, self.reading.on_keys(site, factors, value=1.0), image, question)
