"""PATNet, its blocks and its partial attentions: haiduo/PartialNet, whose code names the parts of PATNet."""

import re

from torch import Tensor

from heedful.authors.table import Table

CHANNEL = (
    (r"partial_conv3\.(.*)", r"conv.\1"),
    (r"attn\.cfc1\.(.*)", r"style.\1"),
    (r"attn\.bn\.(.*)", r"style_norm.\1"),
)
SELF = (
    (r"partial_conv3\.(.*)", r"conv.\1"),
    (r"attn\.rpe_k\.lookup_table_bias", r"bias_table"),
    (r"attn\.(.*)", r"\1"),
)
SPATIAL = (
    (r"conv_attn\.(.*)", r"gate.\1"),
    (r"conv\.(.*)", r"mix.\1"),
    (r"norm2\.(.*)", r"mix_norm.\1"),
    (r"norm\.(.*)", r"gate_norm.\1"),
)
# The kinds of attention have no name in common, but norm, which stays.
BLOCK = tuple(
    (rf"spatial_mixing\.{theirs}", rf"mixer.{ours}") for theirs, ours in dict(CHANNEL + SELF).items()
)
BLOCK += ((r"spatial_mixing\.(.*)", r"mixer.\1"),)
BLOCK += tuple((rf"mlp\.4\.{theirs}", rf"mlp.3.{ours}") for theirs, ours in SPATIAL)
BLOCK += (
    (r"mlp\.0\.(.*)", r"mlp.0.conv.\1"),
    (r"mlp\.1\.(.*)", r"mlp.0.norm.\1"),
    (r"mlp\.3\.(.*)", r"mlp.2.\1"),
)
STEM = (
    (r"patch_embed\.proj\.(.*)", r"stages.0.0.conv.\1"),
    (r"patch_embed\.norm\.(.*)", r"stages.0.0.norm.\1"),
    (r"avgpool_pre_head\.1\.(.*)", r"features_conv.\1"),
)


def stages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors count mergings between the stages, and blocks from 0; here a merging opens its stage."""
    block, ours = Table(rename=BLOCK), {}
    for name, value in state.items():
        if found := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.*)", name):
            name = f"stages.{int(found[1]) // 2}.{int(found[2]) + 1}.{block.name(found[3])}"
        elif found := re.fullmatch(r"stages\.(\d+)\.(reduction|norm)\.(.*)", name):
            part = "conv" if found[2] == "reduction" else "norm"
            name = f"stages.{(int(found[1]) + 1) // 2}.0.{part}.{found[3]}"
        ours[name] = value
    return ours


TABLES = {
    "PATNet": Table(rename=STEM, relayout=stages),
    "Block": Table(rename=BLOCK),
    "PartialChannelAttention": Table(rename=CHANNEL),
    "PartialSelfAttention": Table(rename=SELF),
    "PartialSpatialAttention": Table(rename=SPATIAL),
}
