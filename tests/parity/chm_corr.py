"""Ranking by matched cells, with the automatic mask and a user's."""

from __future__ import annotations

from typing import Any

import torch

from heedful.inspect.correspondence_classifier import (
    attended_cells,
    cell_similarity,
    cross_correlation_map,
    vote,
)
from tests.parity.harness import Tensors, adapter


@adapter("chm-corr")
def chm_corr(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    # The file pairs each neighbour with a query of its own, so that the steps are called one by one.
    source, target = inputs["source"].double(), inputs["target"].double()
    similarity = cell_similarity(source, target, inputs["correspondence"])
    cc_maps = cross_correlation_map(source, target)
    score = (similarity * attended_cells(cc_maps, config["T"])).flatten(1).topk(5).values.mean(1)
    prediction, votes = vote(score, inputs["labels"], config["K"])
    return {
        "similarity_maps": similarity,
        "cc_maps": cc_maps,
        "score_cc": score,
        "score_user": (similarity * inputs["user_mask"]).mean((1, 2)),
        "prediction": torch.tensor(prediction),
        "votes": torch.tensor(votes),
    }
