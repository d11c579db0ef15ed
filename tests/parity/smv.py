"""Words for saliency maps: each search and threshold of the file, and the summary, as released.

The file states its results in its text, not as arrays; tests/inspect/test_saliency_words.py holds them.
"""

from __future__ import annotations

from typing import Any

import torch

from heedful.inspect.saliency_words import Snippet, SnippetSearch
from tests.parity.harness import Tensors, adapter

METRICS = {"mean": 0.4, "quantile": 1.0}


def _table(found: list[Snippet], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(snippets, n) ones at the places, and (snippets) scores, in falling order of places."""
    found = sorted(found, key=lambda snippet: snippet.places, reverse=True)
    ones = torch.zeros(len(found), n, dtype=torch.int64)
    for row, snippet in zip(ones, found, strict=True):
        row[list(snippet.places)] = 1
    return ones, torch.tensor([snippet.score for snippet in found], dtype=torch.float64)


@adapter("smv")
def smv(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    scores = inputs["attributions"]
    outputs = {}
    for metric, value in METRICS.items():
        for sign in ("+", None):
            search = SnippetSearch(metric, value, sign, config["filter_length"], legacy=True)
            for kind, found in (("conv", search.convolution(scores)), ("span", search.spans(scores))):
                name = f"{metric}_{sign}.{kind}"
                outputs[f"{name}.places"], outputs[f"{name}.scores"] = _table(found, len(scores))
    search = SnippetSearch("quantile", 1.0, length=config["filter_length"], legacy=True)
    outputs["summary"], _ = _table(search.summary(scores), len(scores))
    return outputs
