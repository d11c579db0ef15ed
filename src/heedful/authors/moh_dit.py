"""MoH-DiT: SkyworkAI/MoH, the released diffusion transformers."""

from __future__ import annotations

import re

from torch import Tensor

from heedful.authors import moh
from heedful.authors.table import Table

ATTENTION = moh.TABLES["MixtureOfHeadAttention"]


def attentions(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention of every block, by the table of a single one."""
    ours: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in theirs.items():
        if found := re.fullmatch(r"(blocks\.\d+)\.attn\.(.*)", name):
            blocks.setdefault(found[1], {})[found[2]] = value
        else:
            ours[name] = value
    for block, own in blocks.items():
        ours |= {f"{block}.attention.{name}": value for name, value in ATTENTION.apply(own).items()}
    return ours


TABLES = {
    "MoHDiT": Table(
        rename=(
            (r"pos_embed", "positions"),
            (r"x_embedder\.proj\.(.*)", r"embed.\1"),
            (r"t_embedder\.mlp\.(.*)", r"time.\1"),
            (r"y_embedder\.embedding_table\.(.*)", r"labels.\1"),
            (r"(blocks\.\d+)\.adaLN_modulation\.1\.(.*)", r"\1.condition.\2"),
            (r"final_layer\.adaLN_modulation\.1\.(.*)", r"condition.\1"),
            (r"final_layer\.linear\.(.*)", r"out.\1"),
        ),
        relayout=attentions,
    )
}
