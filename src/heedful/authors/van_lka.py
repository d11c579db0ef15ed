"""VAN and its large kernel attention: Visual-Attention-Network/VAN-Classification."""

import re

from torch import Tensor

from heedful.authors.table import Table

_BLOCK = (
    (r"(.*)layer_scale_([12])", r"\1scale\2.gamma"),
    (r"(.*)attn\.proj_1\.(.*)", r"\1mixer.proj_in.\2"),
    (r"(.*)attn\.spatial_gating_unit\.(.*)", r"\1mixer.lka.\2"),
    (r"(.*)attn\.proj_2\.(.*)", r"\1mixer.proj_out.\2"),
    (r"(.*)mlp\.dwconv\.dwconv\.(.*)", r"\1mlp.dwconv.\2"),
)
_PARTS = (
    (r"patch_embed(\d+)\.proj\.(.*)", "downsample.{}.0.{}"),
    (r"patch_embed(\d+)\.norm\.(.*)", "downsample.{}.1.{}"),
    (r"block(\d+)\.(.*)", "stages.{}.{}"),
    (r"norm(\d+)\.(.*)", "norms.{}.{}"),
)


def _stages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors count stages from 1."""
    ours = {}
    for name, value in state.items():
        for pattern, form in _PARTS:
            if found := re.fullmatch(pattern, name):
                name = form.format(int(found[1]) - 1, found[2])
                break
        ours[name] = value
    return ours


TABLES = {
    "VAN": Table(rename=_BLOCK, relayout=_stages),
    "Block": Table(rename=_BLOCK),
    "LargeKernelAttention": Table(),
}
