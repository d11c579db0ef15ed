"""Bi-level routing attention: rayleizhu/BiFormer, the released module and the refactored NCHW one."""

from torch import Tensor

from heedful.authors.table import Table


def _linear(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 x 1 convolutions as linear maps."""
    flat = ("qkv.weight", "out.weight")
    return {n: t.flatten(1) if n in flat and t.shape[2:] == (1, 1) else t for n, t in state.items()}


_BLOCK = r"stages\.(\d+\.\d+)\."

TABLES = {
    "BiFormer": Table(
        rename=(
            (r"downsample_layers\.(.*)", r"downsample.\1"),
            (_BLOCK + r"pos_embed\.(.*)", r"stages.\1.positions.\2"),
            (_BLOCK + r"attn\.qkv\.qkv\.(.*)", r"stages.\1.mixer.qkv.\2"),
            (_BLOCK + r"attn\.wo\.(.*)", r"stages.\1.mixer.out.\2"),
            (_BLOCK + r"attn\.(.*)", r"stages.\1.mixer.\2"),
            (_BLOCK + r"mlp\.0\.(.*)", r"stages.\1.mlp.fc1.\2"),
            (_BLOCK + r"mlp\.3\.(.*)", r"stages.\1.mlp.fc2.\2"),
        )
    ),
    "BiLevelRoutingAttention": Table(rename=((r"qkv\.qkv\.(.*)", r"qkv.\1"), (r"wo\.(.*)", r"out.\1"))),
    "NCHWBiLevelRoutingAttention": Table(
        rename=((r"qkv_linear\.(.*)", r"qkv.\1"), (r"output_linear\.(.*)", r"out.\1")), relayout=_linear
    ),
}
