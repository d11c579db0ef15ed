"""VMoBA: packed samples through the routing rule, and the order of tokens by chunk."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import heedful
from heedful.mixers.grid.vmoba import VideoMixtureOfBlockAttention
from heedful.routing.block_topk import grid_blocks
from heedful.routing.chunk_gate import moba_chunks
from tests.parity.harness import Tensors, adapter


@adapter("vmoba")
def vmoba(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    query, key, value = (inputs[x].transpose(0, 1)[None] for x in "qkv")  # (s, h, d) to (1, h, s, d)
    ends = inputs["cu_seqlens"].tolist()
    outputs = {}
    for case in config:
        if "patch_resolution" in case:
            outputs[case["out"]] = _order(tuple(case["patch_resolution"]), case["chunk_size"])
            continue
        chunks, samples = _packed(ends, case["moba_chunk_size"])
        seen = moba_chunks(
            query,
            key,
            chunks,
            select=case["select_mode"],
            scope=case["threshold_type"],
            threshold=case["simsum_threshold"],
            topk=case["moba_topk"],
            samples=samples,
            legacy=True,
        )
        outputs[case["out"]] = heedful.attention(query, key, value, pattern=seen)[0].transpose(0, 1)
    return outputs


def _packed(ends: list[int], size: int) -> tuple[Tensor, Tensor]:
    """The chunks of samples packed one after the other, and the number of each token's sample."""
    chunks, samples = [], []
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        own = grid_blocks((end - start,), (size,))
        chunks.append(torch.where(own >= 0, own + start, -1))
        samples.append(torch.full((end - start,), number))
    return torch.cat(chunks), torch.cat(samples)


def _order(size: tuple[int, ...], chunk: Any) -> Tensor:
    chunk = tuple(chunk) if isinstance(chunk, list) else chunk
    tokens = VideoMixtureOfBlockAttention(4, heads=1, chunks=(chunk,)).chunks(size).flatten()
    return tokens[tokens >= 0].int()
