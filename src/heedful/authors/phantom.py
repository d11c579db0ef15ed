"""Phantom: ByungKwanLee/Phantom, one `attention` or `self_attn` of its language models.

InternLM2 (1.8B, 7B) holds in `wqkv` KV head after KV head: its queries, its key, its value. Phi3 (3.8B) holds
in `qkv_proj` all queries, all keys, all values. Qwen2 (0.5B) has three projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authors.table import Table


def split_qkv(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One projection into three, by the width of a head and of all query heads."""
    ours = dict(theirs)
    grouped = ours.pop("wqkv.weight", None)
    joined = ours.pop("qkv_proj.weight", grouped)
    if joined is None:
        return ours
    d, queries = ours["gate_first.weight"].shape[1], ours["out.weight"].shape[1]
    keys = (len(joined) - queries) // 2
    if grouped is not None:
        per_group = grouped.unflatten(0, (keys // d, -1, d))
        parts = per_group[:, :-2], per_group[:, -2], per_group[:, -1]
        joined = torch.cat([part.reshape(-1, joined.shape[1]) for part in parts])
    split = joined.split([queries, keys, keys])
    return ours | {f"{name}.weight": p for name, p in zip(("query", "key", "value"), split, strict=True)}


TABLES = {
    "PhantomAttention": Table(
        rename=(
            (r"xattn_(query|key|value)_phantom\.linear_q\.(.*)", r"\1_copy.query.\2"),
            (r"xattn_(query|key|value)_phantom\.linear_k\.(.*)", r"\1_copy.key.\2"),
            (r"xattn_(query|key|value)_phantom\.linear_v\.(.*)", r"\1_copy.value.\2"),
            (r"xattn_(query|key|value)_phantom\.linear_o\.(.*)", r"\1_copy.out.\2"),
            (r"gating_phantom_1\.(.*)", r"gate_first.\1"),
            (r"gating_phantom_2\.(.*)", r"gate_second.\1"),
            (r"q_proj\.(.*)", r"query.\1"),
            (r"k_proj\.(.*)", r"key.\1"),
            (r"v_proj\.(.*)", r"value.\1"),
            (r"(?:wo|o_proj)\.(.*)", r"out.\1"),
        ),
        relayout=split_qkv,
    )
}
