"""GAAM: gioannides/Gaussian-Adaptive-Attention, a multi-head module or a block, whose heads are modules."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from heedful.authors.table import Table

_NAMES = {"mean_offsets": "offsets", "c": "widths"}


def join_heads(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the heads of a layer hold, side by side in the order of their numbers."""
    ours: dict[str, Tensor] = {}
    heads: dict[str, dict[int, Tensor]] = {}
    for name, value in theirs.items():
        found = re.fullmatch(r"(.*)attention_heads\.(\d+)\.(mean_offsets|c)", name)
        if found is None:
            ours[name] = value
        else:
            heads.setdefault(found[1] + _NAMES[found[3]], {})[int(found[2])] = value
    return ours | {name: torch.stack([of[i] for i in sorted(of)]) for name, of in heads.items()}


TABLES = {
    "GaussianAdaptiveAttention": Table(relayout=join_heads),
    "GaussianBlock": Table(relayout=join_heads),
}
