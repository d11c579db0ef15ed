"""What each word of a speech model's output rests on: saliency by random occlusion (SPES)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from heedful.checks import check_positive
from heedful.inspect.slic import slic
from heedful.registry import register


def token_divergence(before: Float[Tensor, "i v"], after: Float[Tensor, "k i v"]) -> Float[Tensor, "k i"]:
    """KL(before || after) in nats for each token, from probabilities; 0 counts as the smallest float."""
    tiny = torch.finfo(before.dtype).tiny
    logs = before.clamp(min=tiny).log() - after.clamp(min=tiny).log()
    return (before * logs).sum(-1)


class PerturbationSaliency:
    """For every token the mean score of the runs in which a feature was occluded, feature by feature.

        saliency_i = sum_m score_im (1 - mask_m) / sum_m (1 - mask_m);   0 where never occluded

    Feed it the runs in batches of any size. Only differences within a token's map tell anything: a feature
    without influence gets the mean score of those that it was occluded with.
    Source: SPES, arXiv 2411.01710.
    """

    def __init__(self) -> None:
        self._score: Tensor | None = None
        self._count: Tensor | None = None

    def add(self, scores: Float[Tensor, "k i"], masks: Shaped[Tensor, "k *shape"]) -> None:
        """Scores of the tokens in k runs, and their masks: 1 kept, 0 occluded."""
        gone = 1 - masks.to(scores.dtype)
        score, count = torch.tensordot(scores, gone, dims=([0], [0])), gone.sum(0)
        self._score = score if self._score is None else self._score + score
        self._count = count if self._count is None else self._count + count

    @property
    def saliency(self) -> Float[Tensor, "i *shape"]:
        """The map of each token so far."""
        if self._score is None or self._count is None:
            raise ValueError("there is no saliency before the first call of add")
        return torch.where(self._count > 0, self._score / self._count.clamp(min=1), 0.0)


@dataclass(frozen=True, eq=False)
class SpeechSaliency:
    """Maps of each output token: of the input's features and of the tokens before it, lower triangle."""

    features: Float[Tensor, "i *shape"]
    tokens: Float[Tensor, "i i"]

    def standardised(self) -> SpeechSaliency:
        """Each token's two maps less their own means, over their own sample standard deviations.

        Of the tokens only those that are seen count; a map of one entry, or of equal ones, becomes 0.
        """
        count = self.tokens.shape[0]
        seen = torch.ones(count, count, dtype=torch.bool, device=self.tokens.device).tril()
        own = _standard(self.features.flatten(1), torch.ones_like(self.features.flatten(1), dtype=torch.bool))
        return SpeechSaliency(own.view(self.features.shape), _standard(self.tokens, seen))

    def joint_min_max(self) -> SpeechSaliency:
        """Each token's two maps together stretched to [0, 1]; tokens that are not seen stay 0."""
        count = self.tokens.shape[0]
        seen = torch.ones(count, count, dtype=torch.bool, device=self.tokens.device).tril()
        flat = self.features.flatten(1)
        low = torch.minimum(flat.amin(1), self.tokens.masked_fill(~seen, torch.inf).amin(1))[:, None]
        high = torch.maximum(flat.amax(1), self.tokens.masked_fill(~seen, -torch.inf).amax(1))[:, None]
        size = torch.where(high > low, high - low, 1.0)
        features = ((flat - low) / size).view(self.features.shape)
        return SpeechSaliency(features, ((self.tokens - low) / size).masked_fill(~seen, 0.0))


def _standard(x: Tensor, seen: Tensor) -> Tensor:
    count = seen.sum(1, keepdim=True)
    centred = (x - (x * seen).sum(1, keepdim=True) / count) * seen
    spread = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    equal = spread <= 1e-6 * x.abs().amax(1, keepdim=True)
    return torch.where(equal, 0.0, centred / torch.where(equal, 1.0, spread))


def spectrogram_segments(
    features: Float[Tensor, "t f"],
    counts: Sequence[int] = (2000, 2500, 3000),
    *,
    reference: int = 500,
    threshold: int = 750,
) -> list[Int[Tensor, "t f"]]:
    """Superpixels of a spectrogram, coarse and fine: its parts that are occluded as one.

    counts     of segments in `reference` frames; longer inputs have more, up to `threshold` frames

    Source: arXiv 2509.18010 (defaults of its example).
    """
    picture = features - features.amin()
    picture = picture / picture.amax().clamp(min=torch.finfo(picture.dtype).tiny)
    share = min(len(features), threshold) / reference
    return [slic(picture, max(1, round(count * share))) for count in counts]


def segment_masks(
    segments: Sequence[Int[Tensor, "t f"]], masks: int, *, p: float = 0.5, batch: int = 32, seed: int = 0
) -> Iterator[Bool[Tensor, "k t f"]]:
    """Masks (True kept) that occlude each segment with probability p, in batches, evenly from each division.

    segments  divisions of the input; for encoder frames one of shape (t, 1) with a number a frame
    masks     how many in all; at least one from each division
    """
    check_positive("masks", masks)
    check_positive("batch", batch)
    if not 0 < p < 1:
        raise ValueError(f"p is {p}, must lie between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    for division in segments:
        left = max(1, masks // len(segments))
        while left > 0:
            count = min(batch, left)
            kept = torch.rand(count, int(division.max()) + 1, generator=generator) >= p
            yield kept.to(division.device)[:, division]
            left -= count


@register(
    "perturbation-saliency",
    kind="inspect",
    paper="cross-attention-half-explanation",
    tags=("attribution", "perturbation"),
    aliases=("spes",),
)
@torch.no_grad()
def perturbation_saliency(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "t c"],
    masks: Iterable[Bool[Tensor, "k t f"]],
    *,
    token_p: float = 0.0,
    seed: int = 0,
) -> SpeechSaliency:
    """Which features of x, and which tokens before it, the model needs for each token it puts out.

    predict  (inputs (k, t, c), kept tokens (k, i)) -> probabilities (k, i, v) of the output in forced
             decoding, where the embeddings of tokens not kept are zeros; `speech_predictor` makes it.
             It is first asked with no tokens left out, (1, 0), which keeps all.
    x        a spectrogram (frames, channels), or the encoder's output
    masks    True kept; f is c, or 1 to occlude whole frames: `segment_masks`
    token_p  the probability to occlude each token before

    A run's score for token i is the divergence of its distribution from that of the whole input.
    Source: SPES, arXiv 2411.01710, as used in arXiv 2509.18010.
    """
    before = predict(x[None], torch.ones(1, 0, dtype=torch.bool, device=x.device))[0]
    generator = torch.Generator().manual_seed(seed)
    features, tokens = PerturbationSaliency(), PerturbationSaliency()
    for kept in masks:
        kept_tokens = (torch.rand(len(kept), len(before), generator=generator) >= token_p).to(x.device)
        scores = token_divergence(before, predict(x * kept, kept_tokens))
        features.add(scores, kept)
        tokens.add(scores, kept_tokens)
    return SpeechSaliency(features.saliency, tokens.saliency.tril())
