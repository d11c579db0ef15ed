"""MetaFormer and PoolFormer: sail-sg/poolformer, and timm's PoolFormer."""

import re

from torch import Tensor

from heedful.authors.table import Table


def _stages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors have one list of stages, strided convolutions and positions; heedful has one of each."""
    ours: dict[str, Tensor] = {}
    network: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if found := re.fullmatch(r"network\.(\d+)\.(.*)", name):
            network.setdefault(int(found[1]), {})[found[2]] = value
        else:
            ours[name] = value
    stage = positions = 0
    for _, part in sorted(network.items()):
        if "proj.weight" in part:  # a strided convolution leads to the next stage
            stage, positions = stage + 1, 0
            ours |= {f"downsample.{stage}.{name.removeprefix('proj.')}": t for name, t in part.items()}
        elif "pos_embed" in part:  # stands before the blocks of its stage
            positions = 1
            ours[f"stages.{stage}.0.table"] = part["pos_embed"]
        else:
            for name, value in part.items():
                block, leaf = name.split(".", 1)
                ours[f"stages.{stage}.{int(block) + positions}.{leaf}"] = value
    return ours


_BLOCK = r"(network\.\d+\.\d+\.)"
_TIMM = (
    (r"stem\.conv\.(.*)", r"downsample.0.\1"),
    (r"stages\.(\d+)\.downsample\.conv\.(.*)", r"downsample.\1.\2"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.layer_scale([12])\.scale", r"stages.\1.\2.scale\3.gamma"),
    (r"stages\.(\d+)\.blocks\.(.*)", r"stages.\1.\2"),
    (r"head\.norm\.(.*)", r"norm.\1"),
    (r"head\.fc\.(.*)", r"head.\1"),
)

TABLES = {
    "MetaFormer": Table(
        rename=(
            (r"patch_embed\.proj\.(.*)", r"downsample.0.\1"),
            *((rf"norm{2 * stage}\.(.*)", rf"norms.{stage}.\1") for stage in range(4)),
            (_BLOCK + r"layer_scale_([12])", r"\1scale\2.gamma"),
            (_BLOCK + r"token_mixer\.(.*)", r"\1mixer.\2"),
            *_TIMM,
        ),
        relayout=_stages,
    ),
    "MetaFormerBlock": Table(
        rename=((r"layer_scale_([12])", r"scale\1.gamma"), (r"token_mixer\.(.*)", r"mixer.\1"))
    ),
}
