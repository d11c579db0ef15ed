"""MambAttention: NikolaiKyhne/MambAttention, the block and the model."""

from __future__ import annotations

import re

from torch import Tensor

from heedful.authors.mamba import TABLES as MAMBA
from heedful.authors.table import Table

_MAMBA = MAMBA["Mamba"]
_MIXER = re.compile(r"(.*\.)(ahead|back)\.(.*)")


def _split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One projection for queries, keys and values there; `join` is a transposed convolution of size 1."""
    ours = {}
    for name, value in state.items():
        if ".in_proj_" in name:
            prefix, kind = name.split("in_proj_")
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                ours[f"{prefix}{part}.{kind}"] = piece
        elif name.endswith("join.weight"):
            ours[name] = value[..., 0].T
        elif found := _MIXER.fullmatch(name):
            ours[f"{found[1]}{found[2]}.{_MAMBA.name(found[3])}"] = value
        else:
            ours[name] = value
    return ours


_BLOCK = (
    *(
        rule
        for theirs, ours in (("time", "time"), ("freq", "frequency"))
        for rule in (
            (rf"{theirs}_mamba\.forward_blocks\.0\.mixer\.(.*)", rf"{ours}.ahead.\1"),
            (rf"{theirs}_mamba\.backward_blocks\.0\.mixer\.(.*)", rf"{ours}.back.\1"),
            (rf"{theirs}_mamba\.forward_blocks\.0\.norm\.(.*)", rf"{ours}.ahead_norm.\1"),
            (rf"{theirs}_mamba\.backward_blocks\.0\.norm\.(.*)", rf"{ours}.back_norm.\1"),
            (rf"{theirs[0]}linear\.(.*)", rf"{ours}.join.\1"),
        )
    ),
    (r"attention\.layernorm\.(.*)", r"norm.\1"),
    (r"attention\.attn\.out_proj\.(.*)", r"attention.out.\1"),
    (r"attention\.attn\.(.*)", r"attention.\1"),
)
_DENSE = r"dense_block\.dense_block\.(.*)"
_IN_MODEL = tuple(
    (rf"TFMambAttention\.(\d+)\.{theirs}", r"blocks.\1." + ours.replace(r"\1", r"\2"))
    for theirs, ours in _BLOCK
)

TABLES = {
    "MambAttention": Table(rename=_BLOCK, relayout=_split),
    "MambAttentionModel": Table(
        rename=(
            *_IN_MODEL,
            (r"dense_encoder\.dense_conv_1\.(.*)", r"enter.\1"),
            (rf"dense_encoder\.{_DENSE}", r"enter_dense.layers.\1"),
            (r"dense_encoder\.dense_conv_2\.(.*)", r"narrow.\1"),
            (rf"mask_decoder\.{_DENSE}", r"mask_dense.layers.\1"),
            (r"mask_decoder\.mask_conv\.(.*)", r"mask.\1"),
            (r"mask_decoder\.lsigmoid\.slope", "slope"),
            (rf"phase_decoder\.{_DENSE}", r"phase_dense.layers.\1"),
            (r"phase_decoder\.phase_conv\.(.*)", r"phase.\1"),
            (r"phase_decoder\.phase_conv_r\.(.*)", r"real.\1"),
            (r"phase_decoder\.phase_conv_i\.(.*)", r"imaginary.\1"),
        ),
        relayout=_split,
    ),
}
