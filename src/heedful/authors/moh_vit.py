"""Mixture-of-head attention on maps: SkyworkAI/MoH, one `attn` of its TransNeXt (MoH-ViT)."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.moh import GATE
from heedful.authors.table import Table

COSINE = (*GATE, (r"cpb_fc1\.(.*)", r"position_in.\1"), (r"cpb_fc2\.(.*)", r"position_out.\1"))


def flat_convolution(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their convolution of one place is a matrix."""
    return {n: w.flatten(1) if n == "reduce.weight" else w for n, w in theirs.items()}


TABLES = {
    "MixtureOfHeadVisionAttention": Table(rename=COSINE),
    "MixtureOfHeadAggregatedAttention": Table(
        rename=(
            *COSINE,
            (r"q\.(.*)", r"query.\1"),
            (r"sr\.(.*)", r"reduce.\1"),
            (r"relative_pos_bias_local", r"local_bias"),
            (r"learnable_tokens", r"tokens"),
            (r"learnable_bias", r"token_bias"),
        ),
        relayout=flat_convolution,
    ),
}
