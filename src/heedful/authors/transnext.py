"""TransNeXt, its attentions and its feed-forward net: DaiShiResearch/TransNeXt."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.table import Table

POSITIONS = ((r"cpb_fc1\.(.*)", r"position_in.\1"), (r"cpb_fc2\.(.*)", r"position_out.\1"))
AGGREGATED = (
    *POSITIONS,
    (r"q\.(.*)", r"query.\1"),
    (r"sr\.(.*)", r"reduce.\1"),
    (r"relative_pos_bias_local", r"local_bias"),
    (r"learnable_tokens", r"tokens"),
    (r"learnable_bias", r"token_bias"),
)
CONV_GLU = ((r"dwconv\.dwconv\.(.*)", r"dwconv.\1"),)


def flat_convolution(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their convolution of one place is a matrix."""
    return {n: w.flatten(1) if n.endswith("reduce.weight") else w for n, w in theirs.items()}


def frame(attention: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Names of the whole model, whose stages are counted from 1; `attention`: names inside of its `attn`."""
    renames = []
    for stage in range(4):
        theirs, ours = rf"block{stage + 1}\.(\d+)\.", rf"stages.{stage}.\1."
        renames += [(theirs + r"attn\." + a, ours + "mixer." + b.replace(r"\1", r"\2")) for a, b in attention]
        renames += [
            (theirs + r"attn\.(.*)", ours + r"mixer.\2"),
            (theirs + r"mlp\.dwconv\.dwconv\.(.*)", ours + r"mlp.dwconv.\2"),
            (theirs + r"(.*)", ours + r"\2"),
            (rf"patch_embed{stage + 1}\.(.*)", rf"downsample.{stage}.\1"),
            (rf"norm{stage + 1}\.(.*)", rf"norms.{stage}.\1"),
        ]
    return tuple(renames)


TABLES = {
    "TransNeXt": Table(rename=frame(AGGREGATED), relayout=flat_convolution),
    "AggregatedAttention": Table(rename=AGGREGATED, relayout=flat_convolution),
    "GlobalCosineAttention": Table(rename=POSITIONS),
}
