"""Attention as an explanation, and Kendall's tau of the tops of rankings."""

from __future__ import annotations

from typing import Any

import torch

from heedful.inspect import AttentionRollout, attention_average, attention_flow, kendall_top_k
from tests.parity.harness import Tensors, adapter


def _inputs(config: Any, drawn: Tensors) -> Tensors:
    return {**drawn, "attn": drawn["attn"].softmax(-1)}


@adapter("attention-agreement", inputs=_inputs)
def agreement(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    rollout = AttentionRollout()
    for layer in inputs["attn"].unbind(1):
        rollout.add(layer)
    assert rollout.table is not None
    flows = [attention_flow(list(layers), output=0) for layers in inputs["attn"]]
    pairs = zip(inputs["rank_a"], inputs["rank_b"], strict=True)
    taus = [[kendall_top_k(a, b, k, p=config["p"]) for k in (None, 3, "nonzero")] for a, b in pairs]
    return {
        "rollout": rollout.table[:, 0],
        "flow": torch.stack([flow / flow.sum() for flow in flows]).float(),
        "average": attention_average(inputs["attn"]),
        "kendall": torch.tensor(taus, dtype=torch.float64),
    }
