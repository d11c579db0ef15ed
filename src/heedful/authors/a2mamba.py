"""A2Mamba: LMMMEng/A2Mamba (`models/a2mamba.py`). The bias table stands there twice."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.table import Table, inside


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

_MIXER = Table(rename=_MASS, drop=(r"rpb\.1",), relayout=_layouts)


def _model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales and the head stand there as convolutions."""
    flat = {
        name: t.flatten() if name.endswith((".scale1.weight", ".scale2.weight")) else t
        for name, t in state.items()
    }
    if "head.weight" in flat:
        flat["head.weight"] = flat["head.weight"].flatten(1)
    return inside(r"stages\.\d+\.\d+\.mixer\.", _MIXER)(flat)


def _block(stage: int) -> tuple[tuple[str, str], ...]:
    there, here = rf"layers\.{2 * stage}\.blocks\.(\d+)\.", rf"stages.{stage}.\1."
    return (
        (there + r"token_mixer\.(.*)", here + r"mixer.\2"),
        (there + r"cpe([12])\.(.*)", here + r"positions\2.\3"),
        (there + r"layer_scale([12])\.(.*)", here + r"scale\2.\3"),
        (there + r"(.*)", here + r"\2"),
    )


_PARTS = ("conv", "norm")

TABLES = {
    "AttentionAugmentedSSM": Table(rename=_SSM, relayout=_layouts),
    "MultiScaleAttentionAugmentedSSM": _MIXER,
    "A2Mamba": Table(
        rename=(
            *(
                (rf"patch_embed\.{3 * i + j}\.(.*)", rf"downsample.0.{2 * i}.{part}.\1")
                for i in range(4)
                for j, part in enumerate(_PARTS)
            ),
            *(
                (rf"layers\.{2 * stage - 1}\.{j}\.(.*)", rf"downsample.{stage}.{part}.\1")
                for stage in (1, 2, 3)
                for j, part in enumerate(_PARTS)
            ),
            *(pair for stage in range(4) for pair in _block(stage)),
            (r"classifier\.0\.(.*)", r"proj.\1"),
            (r"classifier\.1\.(.*)", r"norm.\1"),
            (r"classifier\.4\.(.*)", r"head.\1"),
        ),
        drop=(r"layers\.\d+\.rope\.angle",),
        relayout=_model,
    ),
}
