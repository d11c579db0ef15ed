"""Visual attention redistribution."""

from __future__ import annotations

from typing import Any

import torch

from heedful.inspect.sinks import sink_score
from heedful.steer.var_visattnsink import redistribute
from tests.parity.harness import Tensors, adapter


def _inputs(config: Any, drawn: Tensors) -> Tensors:
    """Five sinks, and 55 rows that look at the image, as the stated shapes of the outputs have it."""
    hidden, attn = torch.ones_like(drawn["hidden"]), torch.zeros_like(drawn["attn"])
    hidden[:, [0, 2, 5, 7, 20], config["dim_sink"][0]] = 100.0
    rows = attn.view(-1, attn.shape[-1])
    rows[:55, config["image_begin"] : config["image_begin"] + config["vis_len"]] = 1 / config["vis_len"]
    rows[55:, 0] = 1.0
    return {"hidden": hidden, "attn": attn, "attn_decode": attn[:, :, -1:]}


@adapter("var-redistribute", inputs=_inputs)
def var(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    sinks = sink_score(inputs["hidden"], config["dim_sink"]) > config["tau"]
    begin, end = config["image_begin"], config["image_begin"] + config["vis_len"]
    n = sinks.shape[1]
    image = torch.zeros(1, n, dtype=torch.bool)
    image[:, begin:end] = True
    how = {
        "min_nonsink_ratio": 1 - config["rho_max_sink_share"],
        "min_image_share": config["summ"],
        "keep": config["p"],
    }
    moved, chosen = redistribute(inputs["attn"], image, sinks, **how)
    text = torch.arange(n)[:, None] >= end
    decoded, _ = redistribute(inputs["attn_decode"], image, sinks, **how)
    return {
        "sink_indices": sinks[0].nonzero()[:, 0],
        "attn": torch.where(text, moved, inputs["attn"]),
        "attn_decode": decoded,
        "candidates": chosen.nonzero(),
    }
