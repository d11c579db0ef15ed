"""MHS-VM: PixDeep/MHS-VM (`models/vmunet`). Their modules hold shared weights under two names.

Weights of their wrapper around the network stand behind "vmunet.": load(..., prefix_strip=("vmunet.",)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authors.table import Table, inside

_PARTS = {
    "x_proj_weight": "read",
    "dt_projs_weight": "step",
    "dt_projs_bias": "step_bias",
    "A_logs": "log_rate",
    "Ds": "skip",
}


def _join_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The four routes of each head, one head after the other, as the routes of one state space."""
    ours = {name: value for name, value in state.items() if ".mambaeng." not in name}
    for theirs, part in _PARTS.items():
        for prefix in sorted({n.split("scanhead_")[0] for n in state if n.endswith(f"mambaeng.{theirs}")}):
            heads = [state.get(f"{prefix}scanhead_{letter}.mambaeng.{theirs}") for letter in "CXSZ"]
            joined = torch.cat([head for head in heads if head is not None])
            if theirs in ("A_logs", "Ds"):
                joined = joined.unflatten(0, (4 * sum(head is not None for head in heads), -1))
            ours[f"{prefix}ssm.{part}"] = joined
    return ours


_DROP = (r"(.*\.)?x_ssproj_W", r".*\.seq2seq_engine\..*")
_SCAN = (
    (r"x_ssproj\.weight", "enter.weight"),
    (r"cat_norm\.(weight|bias)", r"norm.\1"),
    (r"y_proj\.weight", "out.weight"),
)

_GATE = Table(
    rename=(
        (r"in_proj\.weight", "enter.weight"),
        (r"conv2d\.(weight|bias)", r"conv.\1"),
        (r"out_norm\.(weight|bias)", r"norm.\1"),
        *((rf"mhs\.{theirs}", f"scan.{ours}") for theirs, ours in _SCAN),
        (r"mhs\.(.*)", r"scan.\1"),
    ),
    drop=_DROP,
    relayout=_join_heads,
)


def _stages(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    there, here = theirs + r"\.(\d)\.blocks\.(\d+)\.", ours + r".\1.\2."
    return (
        (there + r"ln_1\.(.*)", here + r"norm.\3"),
        (there + r"self_attention\.(.*)", here + r"mixer.\3"),
    )


TABLES = {
    "MultiHeadScan2d": Table(rename=_SCAN, drop=_DROP, relayout=_join_heads),
    "MultiHeadScanGate": _GATE,
    "MHSVMUNet": Table(
        rename=(
            (r"patch_embed\.proj\.(.*)", r"embed.0.\1"),
            (r"patch_embed\.norm\.(.*)", r"embed.1.\1"),
            *_stages("layers", "down"),
            (r"layers\.(\d)\.downsample\.(.*)", r"merges.\1.\2"),
            *_stages("layers_up", "up"),
            *((rf"layers_up\.{i + 1}\.upsample\.(.*)", rf"expands.{i}.\1") for i in range(3)),
            (r"final_up\.(.*)", r"last.\1"),
            (r"final_conv\.(.*)", r"head.\1"),
        ),
        relayout=inside(r"(?:down|up)\.\d\.\d+\.mixer\.", _GATE),
    ),
}
