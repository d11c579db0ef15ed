"""S2-Attention: the authors' block masks, their rows of key blocks, and the token masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from heedful.patterns import Causal, LocalStride, Pattern, RelativeStride
from heedful.selection import BlockTable
from tests.parity.harness import Tensors, adapter


def pattern_of(case: dict[str, Any]) -> Pattern:
    causal = case.get("causal", True)
    if not causal or case.get("vert_position_type") == "relative":
        local = case["local_blocks"]
        local = tuple(local) if isinstance(local, list) else local
        relative = RelativeStride(case["block_size"], local, case["vert_stride"])
        return relative & Causal() if causal else relative
    kv_heads = case.get("num_kv_heads") or case["num_heads"]
    return LocalStride(
        1 if case.get("homo_head") else kv_heads,
        1 if case.get("homo_head") else case["num_heads"] // kv_heads,
        case["block_size"],
        case["local_blocks"],
        case["vert_stride"],
        case.get("head_sliding_step"),
        case.get("head_sliding_offset", 0),
        case.get("num_dense_heads", 0),
    )


def rows(table: BlockTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(crow, col, block mask): key blocks of each query block one after the other; -1 fills col up."""
    count, index = table.count[0], table.index[0]
    crow = torch.nn.functional.pad(count.cumsum(-1), (1, 0)).to(torch.int32)
    col = torch.full((len(count), int(count.sum(-1).max())), -1, dtype=torch.int32)
    blocks = torch.zeros(*count.shape, count.shape[1], dtype=torch.uint8)
    for h in range(len(count)):
        own = [index[h, i, : count[h, i]] for i in range(count.shape[1])]
        joined = torch.cat(own)
        col[h, : len(joined)] = joined.to(torch.int32)
        for i, found in enumerate(own):
            blocks[h, i, found] = 1
    return crow, col, blocks


@adapter("s2-attention")
def s2_attention(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    outputs = {}
    for name, case in config.items():
        pattern, n = pattern_of(case), case["seqlen"]
        table = pattern.block_table(n, block_size=(case["block_size"],) * 2)
        outputs[f"{name}.crow"], outputs[f"{name}.col"], outputs[f"{name}.block_mask"] = rows(table)
        dense = pattern.mask(n)[0]
        outputs[f"{name}.dense_packed"] = torch.from_numpy(np.packbits(dense.numpy(), axis=-1))
    return outputs
