"""SHViT and its attention: ysj9909/SHViT, and timm's port."""

import re

from torch import Tensor

from heedful.authors.table import Table

RENAME = (
    (r"patch_embed\.(.*)", r"stem.\1"),
    (r"head\.bn\.(.*)", r"norm.\1"),
    (r"head\.l\.(.*)", r"head.\1"),
    (r"(.*)\.se\.conv_reduce\.(.*)", r"\1.se.fc1.\2"),  # as timm named them once
    (r"(.*)\.se\.conv_expand\.(.*)", r"\1.se.fc2.\2"),
)


# What timm has apart, in front of the blocks of a stage.
_MERGE = {"0": "0.0", "1": "0.1", "2": "1", "3": "2.0", "4": "2.1"}


def in_a_row(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's stages, with the merging of patches and the blocks in one list."""
    ours = {}
    for name, value in state.items():
        if found := re.fullmatch(r"stages\.(\d+)\.downsample\.(\d)\.(.*)", name):
            name = f"stages.{found[1]}.{_MERGE[found[2]]}.{found[3]}"
        elif found := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.*)", name):
            name = f"stages.{found[1]}.{int(found[2]) + (3 if int(found[1]) else 0)}.{found[3]}"
        ours[name] = value
    return ours


def stages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors count stages from 1, and have short names for what residuals and convolutions hold."""
    ours = {}
    for name, value in in_a_row(state).items():
        name = re.sub(r"^blocks(\d+)", lambda found: f"stages.{int(found[1]) - 1}", name)
        if ".mixer." not in name:
            name = re.sub(r"\.c\.(?=weight$)", ".conv.", name)
            name = re.sub(r"\.bn\.(?=\w+$)", ".norm.", name)
        ours[name.replace(".m.", ".module.")] = value
    return ours


TABLES = {
    "SHViT": Table(rename=RENAME, relayout=stages),
    "SingleHeadPartialAttention": Table(),
}
