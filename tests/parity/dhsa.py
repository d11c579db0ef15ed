"""DHSA: routing by chunks, sparse prefill, the boundary predictor and its labels."""

from __future__ import annotations

from typing import Any

import torch

from heedful.ops.attention import attention
from heedful.patterns import Causal, Window
from heedful.routing.boundary_predictor import (
    BoundaryPredictor,
    boundary_ratios,
    greedy_boundaries,
    mass_ratio,
)
from heedful.routing.chunk_topk import chunk_topk, key_groups
from tests.parity.harness import Tensors, adapter

_TIE = "a chunk is taken in part, and the authors leave open which of its tokens, whose scores are equal"
_NAMES = {"enc.mha": "attention", "enc.norm": "norm", "mlp": "mlp"}


@adapter("dhsa", ignore={"variable.*": _TIE, "mask_variable": _TIE})
def dhsa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    query, key, value = inputs["q"], inputs["k"], inputs["v"]
    n = query.shape[2]
    outputs = {}
    for name, told in config["dhsa_sdpa"].items():
        block, window, last = told["block_size"], told.get("sliding_window_size"), told["instruction_tokens"]
        bounds = inputs["boundaries_variable" if name == "variable" else "boundaries_uniform"]
        first, scale = query[:, :, : n - last], told["scaling"]
        picked = chunk_topk(
            first,
            key,
            bounds,
            block_size=block,
            budget=told["topk_tokens"],
            local_tokens=told["local_tokens"],
            global_tokens=told["global_tokens"],
            window=window,
            norm=told["pooling"] == "avgpool_norm",
            authors_duplicates=True,
        )
        seen = Causal() if window is None else Causal() & Window(window, 0)
        groups = key_groups(picked, block_size=block, n=n - last, m=n)
        y = attention(first, key, value, pattern=groups, scale=scale, query_offset=0)
        rest = attention(query[:, :, n - last :], key, value, pattern=seen, scale=scale)
        outputs |= {f"{name}.y": torch.cat([y, rest], 2), f"{name}.topk_indices": picked}
    outputs["mask_variable"] = outputs["variable.topk_indices"]

    told = config["ratios"]
    masses = boundary_ratios(inputs["attn"][None], window=told["window_size"])
    outputs["ratios"] = mass_ratio(*masses, window=told["window_size"], floor=told["epsilon"])[0]
    told = config["selected"]
    scores = inputs["candidate_scores"]
    chosen = greedy_boundaries(
        scores[None],
        threshold=told["theta"],
        most=told["topk"],
        distance=told["nms_window"],
        end=len(scores) - told["instruction_tokens"],
    )
    outputs["selected"] = torch.tensor(chosen[0])

    told = config["predictor"]
    predictor = BoundaryPredictor(
        told["channel_in"], heads=told["heads"], window=told["window_size"], hidden=told["d_h"]
    )
    renamed = {}
    for name, value in params.items():
        old = next(prefix for prefix in _NAMES if name.startswith(prefix + "."))
        renamed[_NAMES[old] + name[len(old) :]] = value
    predictor.load_state_dict(renamed, strict=True)
    return outputs | {"boundary_logits": predictor.eval()(inputs["feat"].mT)}
