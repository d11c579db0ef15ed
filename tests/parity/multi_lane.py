"""MULTI-LANE: two blocks, the first with prompts."""

from __future__ import annotations

from typing import Any

from heedful import authors
from heedful.models.multi_lane import Block
from tests.parity.harness import Tensors, adapter


@adapter("multi-lane")
def blocks(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    made = []
    for place, prompts in ((0, config["num_prompts"]), (1, 0)):
        block = Block(
            config["dim"],
            heads=config["num_heads"],
            hidden=int(config["mlp_ratio"] * config["dim"]),
            prompts=prompts,
            tasks=config["num_tasks"],
            eps=config["norm_eps"],
        )
        prefix = f"block{place}."
        own = {n.removeprefix(prefix): v for n, v in params.items() if n.startswith(prefix)}
        made.append(authors.load(block, own).eval())
    x, tokens, task = inputs["x"], inputs["task_tokens"], config["current_task_t"]
    x0, tokens0 = made[0](x, tokens)
    x1, tokens1 = made[1](x0, tokens0)
    return {
        "attn_x": made[0].attn.stream(x),
        "attn_tokens": made[0].attn.lanes(tokens, x),
        "x_after0": x0,
        "tokens_after0": tokens0,
        "x_after1": x1,
        "tokens_after1": tokens1,
        "attn_tokens_train_task1": made[0].attn.lanes(tokens[task : task + 1], x, first=task),
    }
