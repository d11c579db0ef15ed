"""Gaze shift guidance."""

from __future__ import annotations

from typing import Any

import torch

from heedful.steer.gift import amplification, enhance, gaze_shift
from tests.parity.harness import Tensors, adapter


@adapter("gift")
def gift(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    m = inputs["k"].shape[2]
    image, question, content = (torch.zeros(1, m, dtype=torch.bool) for _ in range(3))
    image[:, config["v0"] : config["v1"] + 1] = True
    question[:, config["q0"] : config["q1"] + 1] = True
    content[:, [config["q0"] + row for row in config["content_rows"]]] = True
    shift = gaze_shift([inputs[f"attn{layer}"] for layer in config["layers"]], image, content)
    factors = amplification(shift, image, config["alpha"])
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    k, v = (x.repeat_interleave(config["heads"] // config["kv_heads"], dim=1) for x in (k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + inputs["mask"]).softmax(-1)
    weights = enhance(weights, factors, image, question)
    return {
        "saliency": factors[0, image[0]],
        "weights": weights,
        "output": (weights @ v).transpose(1, 2).contiguous(),
    }
