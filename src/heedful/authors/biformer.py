"""Bi-level routing attention: rayleizhu/BiFormer, the released module and the refactored NCHW one."""

from torch import Tensor

from heedful.authors.table import Table


def _linear(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 x 1 convolutions as linear maps."""
    flat = ("qkv.weight", "out.weight")
    return {n: t.flatten(1) if n in flat and t.shape[2:] == (1, 1) else t for n, t in state.items()}


TABLES = {
    "BiLevelRoutingAttention": Table(rename=((r"qkv\.qkv\.(.*)", r"qkv.\1"), (r"wo\.(.*)", r"out.\1"))),
    "NCHWBiLevelRoutingAttention": Table(
        rename=((r"qkv_linear\.(.*)", r"qkv.\1"), (r"output_linear\.(.*)", r"out.\1")), relayout=_linear
    ),
}
