"""A small text encoder around any mixers."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Bool, Int
from torch import Tensor

from heedful.models.stack import Output, Stack, cross_entropy
from heedful.registry import register


@register("encoder", kind="model", paper="attention-is-all-you-need", tags=("language model",))
class Encoder(Stack):
    """A text encoder that sees both ways: embedding, pre-norm blocks, norm, and logits for masked tokens.

        x = E[ids];  for each layer  x = x + mixer(norm(x)),  x = x + mlp(norm(x));  logits = norm(x) E^T

    The arguments are those of `DecoderLM`; mixers that can hide the future do not, those that always do serve
    as they are. `encode(ids, mask=mask)[0]` gives the vectors of the tokens without the logits.

    forward: ids (b, n), mask (b, n) with True = a token; labels (b, n): what stands at each token, -100 where
    it does not count; the loss is the mean cross entropy over those that do.
    Raises ValueError on wrong shapes and on mixers that need more than x.
    Source: Attention Is All You Need, arXiv 1706.03762, in the pre-norm form.
    """

    causal = False
    example: ClassVar[dict[str, Any]] = {"vocabulary": 32, "dim": 16, "depth": 2, "heads": 4}

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
    ) -> Output:
        logits = self.logits(self.encode(ids, mask=mask)[0])
        return Output(logits, None if labels is None else cross_entropy(logits, labels, mask))
