"""Attention calibration."""

from __future__ import annotations

from typing import Any

from heedful.steer.act_attention_calibration import calibrate, excessive, received
from tests.parity.harness import Tensors, adapter


@adapter("act-attention-calibration")
def act(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    weights = inputs["attention_map"]
    sinks = excessive(received(weights), config["THRES"])
    others = [h for h in range(weights.shape[1]) if h != config["HEAD_NUM"]]
    sinks[:, others] = False
    return {"attention_map": calibrate(weights, sinks, config["BETA"])}
