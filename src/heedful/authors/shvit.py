"""SHViT and its attention: ysj9909/SHViT."""

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


def stages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors count stages from 1, and have short names for what residuals and convolutions hold."""
    ours = {}
    for name, value in state.items():
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
