"""A saliency map of a text in words: which words a prediction rests on, as sentences.

Short filters of zeros and ones slide over the scores; tokens under the ones that score high together are a
snippet. The snippets that cover most of the map are joined to spans, and a template words them.
Source: Saliency Map Verbalization, arXiv 2210.07222.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_choice, check_positive
from heedful.registry import register


@dataclass(frozen=True)
class Snippet:
    """Tokens that stand out together.

    places    of the tokens, rising; a snippet of the convolution search may have gaps
    score     mean of their scores, where the highest of the map is 1
    coverage  share of the map's positive scores that lies between the first and the last of them; at least 0
    """

    places: tuple[int, ...]
    score: float
    coverage: float


@dataclass(frozen=True)
class SnippetSearch:
    """Where a saliency map stands out.

        a = scores / |max scores|,   value(f, s) = sum_j f_j a_{s+j} / sum_j f_j > threshold

    for filters f of zeros and ones at every start s; the places where f is 1 are a snippet.

    metric, value  the threshold: "mean", the mean of the highest int(value n) scores; "quantile", value times
                   their standard deviation; "variance", value times their variance
    sign           "+": no chosen score may be below 0; "-": all under the filter must be; None: either
    length         of the filters, in tokens
    legacy         the released code's way: the last start is left out, and a span's last token covers nothing

    Negate the scores to find what speaks against a prediction. Every method takes scores (n).
    ValueError where they are not finite, or not one row.
    Source: Saliency Map Verbalization, arXiv 2210.07222.
    """

    metric: str = "mean"
    value: float = 0.4
    sign: str | None = "+"
    length: int = 5
    legacy: bool = False

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, ("mean", "quantile", "variance"))
        check_choice("sign", self.sign, ("+", "-", None))
        check_positive("length", self.length)

    def convolution(self, scores: Float[Tensor, " n"]) -> list[Snippet]:
        """Snippets of all filters with more than one and fewer than length - 1 ones, the highest first.

        ValueError unless the length is 4 to 8: the number of filters doubles with each token.
        """
        if not 4 <= self.length <= 8:
            raise ValueError(f"length is {self.length}, must be 4 to 8 for the convolution search")
        rows = itertools.product((0, 1), repeat=self.length)
        return self._snippets(scores, [f for f in rows if 1 < sum(f) < self.length - 1])

    def spans(self, scores: Float[Tensor, " n"]) -> list[Snippet]:
        """Snippets without gaps, of 3, 5, ... or length tokens amid the filter, the highest first.

        ValueError unless the length is odd and at least 3.
        """
        if self.length < 3 or self.length % 2 == 0:
            raise ValueError(f"length is {self.length}, must be odd and at least 3 for the span search")
        margins = [(self.length - run) // 2 for run in range(3, self.length + 1, 2)]
        zeros = [(0,) * margin for margin in margins]
        return self._snippets(scores, [z + (1,) * (self.length - 2 * len(z)) + z for z in zeros])

    def tokens(self, scores: Float[Tensor, " n"]) -> list[Snippet]:
        """Every token by itself, the highest first."""
        a = _normalised(scores)
        return self._sorted(a, [(place,) for place in range(len(a))])

    def summary(self, scores: Float[Tensor, " n"], *, top: int = 5) -> list[Snippet]:
        """What the map comes to: a few spans, the one that covers most first.

        The `top` snippets of the convolution, of the spans and of the tokens that cover most; their places
        together, cut into runs; of these the ones whose coverage is in the upper quarter.
        """
        check_positive("top", top)
        a = _normalised(scores)
        places: set[int] = set()
        for found in (self.convolution(a), self.spans(a), self.tokens(a)):
            # What covers nothing is no news, but the released code lists it.
            told = [snippet for snippet in found if snippet.coverage > 0 or self.legacy]
            # Of equals the earlier in the text: in the legacy way all single tokens are.
            told.sort(key=lambda snippet: (-snippet.coverage, snippet.places))
            places.update(*(snippet.places for snippet in told[:top]))
        runs = self._sorted(a, _runs(sorted(places)))
        if not runs:
            return []
        least = torch.tensor([run.coverage for run in runs], dtype=a.dtype).quantile(0.75)
        kept = [run for run in runs if run.coverage >= least]
        return sorted(kept, key=lambda run: -run.coverage)

    def _threshold(self, a: Tensor) -> float:
        if self.metric == "mean":
            count = max(1, int(len(a) * self.value))
            return float(a.sort(descending=True).values[:count].mean())
        spread = a.std(correction=0) if self.metric == "quantile" else a.var(correction=0)
        return self.value * float(spread)

    def _snippets(self, scores: Tensor, rows: Sequence[tuple[int, ...]]) -> list[Snippet]:
        a = _normalised(scores)
        if len(a) < self.length:
            return []
        windows = a.unfold(0, self.length, 1)  # (starts, length)
        windows = windows[:-1] if self.legacy else windows
        filters = torch.tensor(rows, dtype=a.dtype)
        value = windows @ filters.T / filters.sum(1)
        chosen = value > self._threshold(a)
        below = (windows < 0).to(a.dtype) @ filters.T
        if self.sign == "+":
            chosen &= below == 0
        elif self.sign == "-":  # f_j a_j < 0 for every j: a zero in the filter forbids it
            chosen &= below == self.length
        starts, which = chosen.nonzero(as_tuple=True)
        found = {
            tuple(start + j for j in range(self.length) if rows[f][j])
            for start, f in zip(starts.tolist(), which.tolist(), strict=True)
        }
        return self._sorted(a, found)

    def _sorted(self, a: Tensor, places: Iterable[tuple[int, ...]]) -> list[Snippet]:
        made = [Snippet(p, float(a[list(p)].mean()), self._coverage(a, p[0], p[-1])) for p in places]
        return sorted(made, key=lambda snippet: (-snippet.score, snippet.places))

    def _coverage(self, a: Tensor, first: int, last: int) -> float:
        positive = float(a.clamp(min=0).sum())
        between = a[first : last if self.legacy else last + 1]
        return max(0.0, float(between.sum()) / positive) if positive else 0.0


@register(
    "saliency-map-verbalization",
    kind="inspect",
    paper="saliency-map-verbalization",
    aliases=("saliency-words",),
    tags=("attribution", "text", "words"),
)
def saliency_words(
    tokens: Sequence[str],
    scores: Float[Tensor, " n"],
    *,
    search: SnippetSearch | None = None,
    top: int = 5,
    min_coverage: float = 0.1,
) -> str:
    """A saliency map in sentences, such as "The phrase » not bad « is most important for the prediction."

    tokens        n words or pieces of words
    scores        (n), above 0 where a token speaks for the prediction
    search        how salient spans are found; None: `SnippetSearch()`
    top           how many snippets of each search count
    min_coverage  spans with a smaller share of the positive scores are not told

    One token is called a word, several a phrase, or a span if a sentence ends among them. Empty where nothing
    stands out. ValueError unless there is a finite score for each token.
    Source: Saliency Map Verbalization, arXiv 2210.07222.
    """
    _check_tokens(tokens, scores)
    found = (search or SnippetSearch()).summary(scores, top=top)
    told = [_quoted([tokens[i] for i in run.places]) for run in found if run.coverage >= min_coverage]
    if not told:
        return ""
    first, *others = told
    text = f"The {first} is most important for the prediction."
    if others:
        listed = " and the ".join(filter(None, [", the ".join(others[:-1]), others[-1]]))
        text += f" The {listed} {'are' if len(others) > 1 else 'is'} also salient."
    return text


def saliency_prompt(tokens: Sequence[str], scores: Float[Tensor, " n"], *, label: str) -> str:
    """What to ask a chat model, so that it puts a saliency map into words.

    tokens, scores  as for `saliency_words`; the prompt has scores in whole per cent of the largest magnitude
    label           what the explained model predicted

    Its answer is free text that nothing checks: it may name words that the map does not.
    Source of the idea: Saliency Map Verbalization, arXiv 2210.07222; the wording is ours.
    """
    _check_tokens(tokens, scores)
    a = scores.detach().cpu().double()
    share = 100 * a / (a.abs().max() if a.any() else 1.0)
    rows = "\n".join(f"{token}\t{round(x)}" for token, x in zip(tokens, share.tolist(), strict=True))
    return (
        f"A classifier has read a text and predicted: {label}\n"
        "Below is each token of the text with its importance for this prediction, from -100 (speaks "
        "against it) over 0 (does not matter) to 100 (speaks for it).\n\n"
        f"{rows}\n\n"
        "Say in one or two sentences on which words of the text the prediction rests. Go by the numbers "
        "alone, not by what you would have predicted, and quote the words."
    )


def _check_tokens(tokens: Sequence[str], scores: Tensor) -> None:
    if scores.shape != (len(tokens),):
        raise ValueError(f"scores have shape {tuple(scores.shape)}, must be ({len(tokens)},), one a token")


def _normalised(scores: Tensor) -> Tensor:
    """The highest score is 1; where none is above 0, the largest magnitude."""
    if scores.ndim != 1 or not scores.isfinite().all():
        raise ValueError(f"scores have shape {tuple(scores.shape)}, must be one row of finite numbers")
    a = scores.detach().cpu().double()
    if not a.any():
        return a
    highest = a.max()
    return a / (highest if highest > 0 else a.abs().max())


def _runs(places: Sequence[int]) -> list[tuple[int, ...]]:
    """[1, 2, 3, 7] as (1, 2, 3) and (7,)."""
    groups = itertools.groupby(enumerate(places), key=lambda told: told[1] - told[0])
    return [tuple(place for _, place in group) for _, group in groups]


def _quoted(words: Sequence[str]) -> str:
    if len(words) == 1:
        kind = "word"
    else:
        kind = "span" if any(word.endswith(".") for word in words) else "phrase"
    return f"{kind} » {' '.join(words)} «"
