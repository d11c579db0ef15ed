"""A2Mamba: LMMMEng/A2Mamba (`models/a2mamba.py`). The bias table stands there twice."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.table import Table


def _layouts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A first axis for the one route of the state space; 1 x 1 convolutions on tokens are linear maps."""
    ours = {}
    for name, value in state.items():
        parts = name.split(".")
        if "ssm" in parts and parts[-1] in ("read", "step", "step_bias", "log_rate", "skip"):
            value = value[None]
        if name.endswith(("fuse.weight", "out.weight")):
            value = value.flatten(1)
        ours[name] = value
    return ours


_SSM = (
    (r"x_proj_weight", "ssm.read"),
    (r"dt_projs_weight", "ssm.step"),
    (r"dt_projs_bias", "ssm.step_bias"),
    (r"A_logs", "ssm.log_rate"),
    (r"Ds", "ssm.skip"),
    (r"conv2d\.(weight|bias)", r"conv.\1"),
    (r"state_fusion\.(weight|bias)", r"fuse.\1"),
)
_MASS = (
    (r"gate\.0\.(.*)", r"gate.\1"),
    (r"gate\.1\.(.*)", r"gate_norm.\1"),
    (r"proj\.0\.(.*)", r"out_norm.\1"),
    (r"proj\.1\.(.*)", r"out.\1"),
    (r"rpb\.0", "bias"),
    (r"rpb\.2", "global_bias"),
    *((rf"ssm\.{theirs}", f"ssm.{ours}") for theirs, ours in _SSM),
)

TABLES = {
    "AttentionAugmentedSSM": Table(rename=_SSM, relayout=_layouts),
    "MultiScaleAttentionAugmentedSSM": Table(rename=_MASS, drop=(r"rpb\.1",), relayout=_layouts),
}
