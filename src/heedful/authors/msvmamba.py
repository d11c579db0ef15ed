"""MSVMamba: YuHengsss/MSVMamba (`classification/models/vmamba.py`)."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.table import Table, inside

_PARTS = {
    "x_proj_weight": "read",
    "dt_projs_weight": "step",
    "dt_projs_bias": "step_bias",
    "A_logs": "log_rate",
    "Ds": "skip",
}


def _split_scans(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first set of the state space is that of the low map, the second that of the full one."""
    ours = {}
    for name, value in state.items():
        prefix, _, last = name.rpartition(".")
        if last not in _PARTS:
            ours[name] = value
            continue
        start = f"{prefix}." if prefix else ""
        for scan, part in zip(("low_ssm", "ssm"), value.chunk(2), strict=True):
            ours[f"{start}{scan}.{_PARTS[last]}"] = part[None] if last in ("A_logs", "Ds") else part
    return ours


_MIXER = Table(
    rename=(
        (r"in_proj\.weight", "enter.weight"),
        (r"conv2d\.(weight|bias)", r"conv.\1"),
        (r"conv2d_b1\.(weight|bias)", r"low_conv.\1"),
        (r"out_norm\.(weight|bias)", r"norm.\1"),
        (r"se\.fc\.0\.weight", "squeeze.weight"),
        (r"se\.fc\.2\.weight", "excite.weight"),
        (r"out_proj\.weight", "out.weight"),
    ),
    relayout=_split_scans,
)
_BLOCK, _OURS = r"layers\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."

TABLES = {
    "MultiScaleScan2d": _MIXER,
    "MSVMamba": Table(
        rename=(
            (r"patch_embed\.0\.(.*)", r"downsample.0.0.\1"),
            (r"patch_embed\.2\.(.*)", r"downsample.0.1.\1"),
            *((rf"layers\.{s}\.downsample\.(.*)", rf"downsample.{s + 1}.\1") for s in range(3)),
            (_BLOCK + r"norm\.(.*)", _OURS + r"norm1.\3"),
            (_BLOCK + r"op\.(.*)", _OURS + r"mixer.\3"),
            (_BLOCK + r"convFFN\.linear([12])\.(.*)", _OURS + r"mlp.fc\3.\4"),
            (_BLOCK + r"convFFN\.dwc\.(.*)", _OURS + r"mlp.dwconv.\3"),
            (_BLOCK + r"(.*)", _OURS + r"\3"),
            (r"classifier\.(.*)", r"\1"),
        ),
        relayout=inside(r"stages\.\d\.\d+\.mixer\.", _MIXER),
    ),
}
