"""Mixture-of-head attention: SkyworkAI/MoH, one `attn` of its diffusion transformers (MoH-DiT)."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.table import Table

GATE = (
    (r"wg\.(.*)", r"gate.route.\1"),
    (r"wg_0\.(.*)", r"gate.balance.\1"),
    (r"wg_1\.(.*)", r"gate.share.\1"),
)


def split_qkv(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their one projection holds queries, keys and values one after the other."""
    ours = dict(theirs)
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in ours:
            parts = ours.pop(f"qkv.{kind}").chunk(3)
            ours |= {f"{name}.{kind}": p for name, p in zip(("query", "key", "value"), parts, strict=True)}
    return ours


TABLES = {
    "MixtureOfHeadAttention": Table(
        rename=(
            *GATE,
            (r"proj\.(.*)", r"out.\1"),
            (r"q_norm\.(.*)", r"query_norm.\1"),
            (r"k_norm\.(.*)", r"key_norm.\1"),
        ),
        relayout=split_qkv,
    )
}
