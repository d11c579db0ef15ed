"""Tokens that rest on little are drawn again; recent output is looked at more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.checks import check_choice, check_positive
from heedful.hf.cache_name import NAMES
from heedful.hf.tap import Handler, Site, alone
from heedful.inspect.attention_saliency import attention_saliency, candidate_saliency
from heedful.registry import register
from heedful.steer.intervention import Intervention
from heedful.steer.vision import image_tokens


def boost_recent(
    logits: Float[Tensor, "b h n m"], prompt: int, *, beta: float, window: int
) -> Float[Tensor, "b h n m"]:
    """Multiply the weight of recent output by 1 + beta, which is to add log(1 + beta) to its logits.

    A query at position q looks more at output keys j, prompt <= j < q, of the last positions q - 1 - j <=
    window; the queries are the last n of m positions. Source: arXiv 2601.20279.
    """
    n, m = logits.shape[2:]
    key = torch.arange(m, device=logits.device)
    last = key[m - n :, None] - 1  # the position P that a query follows
    recent = (key >= prompt) & (key <= last) & (last - key <= window)
    return logits + math.log1p(beta) * recent


@register(
    "local-coherence-boost", kind="steer", paper="lvlms-saliency", tags=("decoding",), aliases=("locore",)
)
@dataclass(eq=False)
class LocalCoherenceBoost(Intervention):
    """Makes each new token look more at the output tokens just before it (LocoRE).

    beta    gain 1 + beta on the weights, before they are normalised; 0: nothing changes
    window  how many positions back, the last one not counted; not published
    layers  changed layers of the decoder
    prompt  where the output begins; None: after all that the first call read

    Source: arXiv 2601.20279.
    """

    beta: float = 0.15
    window: int = 8
    layers: Sequence[int] = range(9, 15)
    prompt: int | None = None

    def __post_init__(self) -> None:
        if self.beta <= -1.0:
            raise ValueError(f"beta is {self.beta!r}, must be above -1")
        self._begin: int | None = None

    @property
    def idle(self) -> bool:
        return self.beta == 0.0

    def forget(self) -> None:
        self._begin = None

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        if not any(0 <= layer < self.reading.layers for layer in self.layers):
            raise ValueError(
                f"layers is {self.layers}, must name layers of the {self.reading.layers} there are"
            )

    def wants(self, site: Site) -> bool:
        return super().wants(site) and site.layer in self.layers

    def logits(self, site: Site, logits: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        if self._begin is None:
            self._begin = self.reading.ids.shape[1] if self.prompt is None else self.prompt
        read = site.visibility["query_offset"] + logits.shape[2]  # after them, a static cache is empty
        begin = self._begin - self.reading.first_key(site)
        boosted = boost_recent(logits[..., :read], begin, beta=self.beta, window=self.window)
        return torch.cat([boosted, logits[..., read:]], dim=-1)


class _WithGradient(Handler):
    """Keeps the weights of some layers, and zeros added to them to which the loss has a gradient."""

    def __init__(self, owner: SaliencyGuidedRejection) -> None:
        self.owner = owner
        self.found: list[tuple[Tensor, Tensor]] = []

    def wants(self, site: Site) -> bool:
        return Intervention.wants(self.owner, site) and site.layer in self.owner.layers

    def weights(self, site: Site, weights: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
        handle = torch.zeros_like(weights, requires_grad=True)
        self.found.append((weights.detach(), handle))
        return weights + handle


@register(
    "saliency-guided-rejection",
    kind="steer",
    paper="lvlms-saliency",
    tags=("decoding", "gradient"),
    aliases=("sgrs",),
)
@dataclass(eq=False)
class SaliencyGuidedRejection(Intervention):
    """Draws the next token again while it rests on too little of the text before it (SGRS).

    Of the most probable tokens one is drawn; it is accepted if its saliency (`candidate_saliency`) is at
    least alpha times the mean of those accepted last, else it is dropped and another one drawn. If none is
    accepted, the most salient one is taken. Inside the context only the chosen token has a finite logit.

    candidates  tokens to draw from; 1: greedy
    draws       at most, a step
    alpha       of the threshold; 0: every draw is accepted
    history     accepted saliencies that count
    layers      of the decoder, in which saliency is measured
    begin       first position whose keys count; None: after the last image token
    norm        see `attention_saliency`
    generator   tokens are drawn from it

    One sample at a time, with a cache; each step reads all tokens once more, with gradients. Raises
    ValueError for several samples, and where begin is None and the image tokens are not known.
    Source: arXiv 2601.20279, whose released code reads the row of the candidate; here it is that of the
    position which predicts it.
    """

    candidates: int = 5
    draws: int = 3
    alpha: float = 0.6
    history: int = 5
    layers: Sequence[int] = (6, 7, 8)
    begin: int | None = None
    norm: str = "row"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("candidates", "draws", "history"):
            check_positive(name, getattr(self, name))
        check_choice("norm", self.norm, ("row", "matrix"))
        self._accepted: list[float] = []
        self._prompt: dict[str, Any] = {}

    def forget(self) -> None:
        self._accepted.clear()
        self._prompt = {}

    def wants(self, site: Site) -> bool:
        return False

    def enter(self, model: PreTrainedModel, stack: ExitStack) -> None:
        if not any(0 <= layer < self.reading.layers for layer in self.layers):
            raise ValueError(
                f"layers is {self.layers}, must name layers of the {self.reading.layers} there are"
            )
        stack.callback(model.register_forward_hook(self._draw, with_kwargs=True).remove)

    def _draw(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        ids = self.reading.ids
        if ids.shape[0] != 1:
            raise ValueError(f"input_ids has {ids.shape[0]} rows, must have one")
        if not self._prompt:
            skipped = ("input_ids", *NAMES, "attention_mask", "use_cache")
            self._prompt = {name: value for name, value in kwargs.items() if name not in skipped}
        elif (places := kwargs.get("position_ids")) is not None:
            before = self._prompt["position_ids"][..., : ids.shape[1] - self.reading.fresh]
            self._prompt["position_ids"] = torch.cat([before, places], dim=-1)
        types = self._prompt.get("mm_token_type_ids")  # what is written is text
        if types is not None:
            self._prompt["mm_token_type_ids"] = nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        scores = output.logits[0, -1]
        mask = kwargs.get("attention_mask")
        whole = isinstance(mask, Tensor) and mask.shape == ids.shape
        self._prompt["attention_mask"] = mask if whole else torch.ones_like(ids)
        token = self._choose(scores.detach())
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[token] = True
        last = output.logits[:, -1:].masked_fill(~chosen, -torch.inf)
        output.logits = torch.cat([output.logits[:, :-1], last], dim=1)
        return output

    def _choose(self, scores: Float[Tensor, " v"]) -> int:
        best = scores.topk(min(self.candidates, scores.shape[0]))
        left = dict(zip(best.indices.tolist(), best.values.float().softmax(0).tolist(), strict=True))
        if len(left) == 1:
            return next(iter(left))
        judge = self._judge()
        recent = self._accepted[-self.history :]
        threshold = self.alpha * sum(recent) / len(recent) if recent else 0.0
        tried: dict[int, float] = {}
        for _ in range(min(self.draws, len(left))):
            tokens, odds = list(left), torch.tensor(list(left.values()))
            token = tokens[int(torch.multinomial(odds, 1, generator=self.generator))]
            tried[token] = judge(token)
            if tried[token] >= threshold:
                break
            del left[token]
        else:
            token = max(tried, key=lambda t: tried[t])
        self._accepted.append(tried[token])
        return token

    def _judge(self) -> Any:
        """Read everything once with gradients; gives the function from a candidate to its saliency.

        What predicts a candidate does not depend on it, so one forward serves all of them.
        """
        ids, watch = self.reading.ids, _WithGradient(self)
        with torch.enable_grad(), alone(self.model, watch):
            found = self.model.forward(**self._prompt, input_ids=ids, use_cache=False)
            odds = found.logits[0, -1].float().log_softmax(-1)
        begin, row = self._begin(), ids.shape[1] - 1

        def judge(token: int) -> float:
            handles = [handle for _, handle in watch.found]
            with torch.enable_grad():
                gradients = torch.autograd.grad(-odds[token], handles, retain_graph=True)
            layers = [
                attention_saliency(weights[0], gradient[0], norm=self.norm)
                for (weights, _), gradient in zip(watch.found, gradients, strict=True)
            ]
            return candidate_saliency(layers, row, begin)

        return judge

    def _begin(self) -> int:
        if self.begin is not None:
            return self.begin
        image = image_tokens(self.reading, None)[0]
        return int(image.nonzero().max()) + 1 if image.any() else 0
