"""Where a diffusion transformer finds the words of an expression in a picture, with magnets for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heedful.inspect.site import Site
from heedful.registry import register

MAGNETS = ("a", "the", "of", "with", "in", "on", "and", ".")
_LIST = """
a about above across after against all along am among an and any are around as at away be because been
before behind being below beneath beside besides between beyond both but by can could did do does down each
either else every few for from had has have he her hers him his how i if in inside into is it its just like
may me might more most much must my near neither next no nor not now of off on once one only onto or other
our ours out outside over own same shall she should since so some such than that the their them then there
these they this those through to too toward towards under until up upon us very was we were what when where
which while who whom whose why will with within without would you your
"""
STOP_WORDS = frozenset(_LIST.split())
Word = tuple[str, list[int]]


def with_magnets(expression: str, *, colour: str = "pink") -> str:
    """An expression with stop words and a colour behind it, which draw what attention is to spare.

    colour  a colour that the expression does not name; pink is ours

    Source: RefAM, arXiv 2509.22650, whose own list was not at hand.
    """
    return " ".join((expression, *MAGNETS, colour))


def content_words(expression: str, offsets: Sequence[tuple[int, int]]) -> list[Word]:
    """The words of an expression that are no stop words, and which tokens write each.

    expression  without its magnets
    offsets     from where to where in the text each token is, as tokenizers of transformers give it with
                return_offsets_mapping=True, for the expression with its magnets; special tokens and padding
                have offsets of no length

    Nouns, adjectives and verbs are not told apart from other words that stay.
    """
    words: list[Word] = []
    for match in re.finditer(r"\w+(?:['’-]\w+)*", expression):
        if match[0].lower() not in STOP_WORDS:
            tokens = [i for i, (a, b) in enumerate(offsets) if max(a, match.start()) < min(b, match.end())]
            if tokens:  # else the text was cut before it
                words.append((match[0], tokens))
    return words


@register("global-attention-sinks", kind="inspect", paper="refam", tags=("sink", "diffusion"))
def find_global_sinks(
    columns: Sequence[Float[Tensor, "*b m"]], *, sigmas: float = 3.0
) -> Bool[Tensor, "*b m"]:
    """The text tokens to which images attend far above the rest, whatever the place, in the deeper blocks.

        sink_j:  in at least half of the deeper half of the blocks  c_j > mean(c) + sigmas std(c)

    columns  of each block, first to last, the mean weight that image tokens give each text token, as
             `AttentionMagnets.columns` has them

    The deviation is over the m tokens; among ten or fewer none can lie above 3. The rule is ours.
    ValueError without a block. Source: RefAM, arXiv 2509.22650.
    """
    if not columns:
        raise ValueError("columns is empty, must hold those of at least one block")
    deeper = torch.stack([*columns[len(columns) // 2 :]])
    above = deeper - deeper.mean(-1, keepdim=True)
    deviation = above.square().mean(-1, keepdim=True).sqrt()
    return 2 * (above > sigmas * deviation).sum(0) >= len(deeper)


@register("attention-magnets", kind="inspect", paper="refam", tags=("diffusion", "image", "grounding"))
class AttentionMagnets:
    """What the tokens of an image give the words of a text, the mean over the heads and blocks of a DiT.

        H = mean_{words w} sum_{j in w} mean_{l, h} A_lh[:, j],  A: softmax over all keys, also of the image

        text = tokenizer(with_magnets("the red car"), return_offsets_mapping=True, ...)
        see = AttentionMagnets(text=range(512), image=range(512, 4608), grid=(64, 64), first=28)
        with capture(transformer, see):
            transformer(noisy latent, text states, ...)          # one step, at a middle timestep
        see.heatmap(content_words("the red car", text.offset_mapping))

    text   where the text tokens are among the keys
    image  where the image tokens are among the queries; both from 0 where text is seen by cross-attention
    grid   (height, width) in tokens, or (frames, height, width)
    first  the first block that counts: half of the blocks for the deeper half

    Calls of another number of queries or keys are left out. Weights are made for some rows at a time, so that
    no table of image tokens by image tokens exists.
      columns  for each block, (b, m): the mean weight of each text token; `find_global_sinks` reads them
      blocks   how many were added up

    Nothing is normalised again over what is kept, which would raise the noise of the background.
    Source: RefAM, arXiv 2509.22650.
    """

    def __init__(self, *, text: range, image: range, grid: tuple[int, ...], first: int = 0) -> None:
        places = torch.Size(grid).numel()
        if len(image) != places:
            raise ValueError(f"image has {len(image)} tokens, must have the {places} of the grid {grid}")
        if text.step != 1 or image.step != 1 or not text:
            raise ValueError(f"text is {text} and image {image}, must be ranges of step 1 that are not empty")
        self.text, self.image, self.grid, self.first = text, image, grid, first
        self.columns: list[Float[Tensor, "b m"]] = []
        self.blocks = 0
        self._sum: Float[Tensor, "b n m"] | None = None

    @property
    def _shape(self) -> tuple[int, int]:
        """Of the tables of weights: of both in one sequence, or of one that looks at the other."""
        apart = self.text.start >= self.image.stop or self.image.start >= self.text.stop
        both = max(self.text.stop, self.image.stop)
        return (both, both) if apart else (self.image.stop, self.text.stop)

    def __call__(self, site: Site) -> None:
        if site.shape[2:] != self._shape:
            return
        parts = []
        for rows in site.pieces():
            own = slice(max(rows.start, self.image.start), min(rows.stop, self.image.stop))
            if own.start < own.stop:
                parts.append(site.weights(own)[..., self.text.start : self.text.stop].float().mean(1))
        table = torch.cat(parts, dim=1)
        self.columns.append(table.mean(1))
        if len(self.columns) > self.first:
            self._sum = table if self._sum is None else self._sum + table
            self.blocks += 1

    @property
    def table(self) -> Float[Tensor, "b n m"]:
        """What each image token gives each text token. ValueError before the first block that counts."""
        if self._sum is None:
            n, m = self._shape
            raise ValueError(f"no block of {n} queries and {m} keys from number {self.first} on was seen")
        return self._sum / self.blocks

    def heatmap(
        self, words: Iterable[Word], *, drop: Bool[Tensor, " m"] | None = None
    ) -> Float[Tensor, "b *grid"]:
        """The map of the words to keep: the mean over words of the sum over their tokens.

        words  as `content_words` gives them
        drop   tokens to leave out: those that are sinks. A word of which nothing is left is an error; append
               magnets, which take the sink upon themselves
        """
        words, maps = list(words), []
        if not words:
            raise ValueError("words is empty, must hold at least one")
        for word, tokens in words:
            kept = [j for j in tokens if drop is None or not drop[j]]
            if not kept:
                raise ValueError(
                    f"all of {word!r} would be dropped; append magnets to the text (with_magnets)"
                )
            maps.append(self.table[..., kept].sum(-1))
        return torch.stack(maps).mean(0).unflatten(1, self.grid)


def heatmap_peak(heatmap: Float[Tensor, "b *grid"]) -> Int[Tensor, "b axes"]:
    """Where each map is highest: (row, column), of videos (frame, row, column). It prompts a segmenter."""
    return torch.stack(torch.unravel_index(heatmap.flatten(1).argmax(1), heatmap.shape[1:]), dim=-1)
