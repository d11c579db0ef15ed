"""MoA: spans at two lengths, cache sizes, and densities."""

from __future__ import annotations

from typing import Any

import torch

from heedful.patterns import Causal, ElasticSpan
from tests.parity.harness import Tensors, adapter

LENGTHS = (1024, 2048)
BUDGETS = ((100, 64), (100, 1024), (3000, 64), (3000, 1024))


@adapter("moa")
def moa(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    alpha, beta = inputs["alpha"].tolist(), inputs["beta"].tolist()
    size, defaults = config["block_size"], config["cache_defaults"]
    sink = defaults["sink_size"]
    outputs = {}
    for n in LENGTHS:
        rule = ElasticSpan(alpha, beta, sink, size, n)
        seen = rule.mask(n)[0]
        # The authors' layout is the causal one mirrored; the causal mask cuts it again.
        blocks = rule.block_table(n, block_size=(size, size)).dense(heads=rule.heads)[0, :, size - 1 :: size]
        blocks = blocks[..., ::size]
        outputs[f"layout_{n}"] = blocks | blocks.mT
        outputs[f"causal_row_counts_{n}"] = seen.sum(-1).to(torch.int32)
    rule = ElasticSpan(alpha, beta, sink, defaults["split_size"])
    for prompt, new in BUDGETS:
        sizes, static = rule.cache_sizes(prompt + new, minimum=defaults["minimum_cache_size"])
        outputs[f"cache_{prompt}_{new}"], outputs[f"static_{prompt}_{new}"] = sizes[None], static[None]
    # streamingllm_attention_density(4, 32, 128) and the density of its cache
    window = ElasticSpan(32, 0, 4, 1)
    visible = window.mask(128).sum().double() / Causal().mask(128).sum()
    outputs["density"] = torch.stack([visible, window.kv_density(128)[0]])
    return outputs
