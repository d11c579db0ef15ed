"""Union of Experts: YujiaoYang-work/UoE, an `SMHA` (v3), whose residual and norm are left to the block."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.table import Table


def join_experts(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (experts, in, out) one below the other as those of a linear layer, and biases likewise."""
    ours = dict(theirs)
    for name in ("query", "kv"):
        if f"{name}.weight" in ours:
            ours[f"{name}.weight"] = ours[f"{name}.weight"].mT.flatten(0, 1)
            ours[f"{name}.bias"] = ours[f"{name}.bias"].flatten()
    return ours


TABLES = {
    "SelectiveMultiHeadAttention": Table(
        drop=(r"layer_norm\..*", r".*inv_freq"),
        rename=(
            (r"switch_gate\.w_gate\.(.*)", r"gate.linear.\1"),
            (r"W_q\.(weight|bias)\.0", r"query.\1"),
            (r"W_kv\.(weight|bias)\.0", r"kv.\1"),
            (r"ff\.weight\.0", "out"),
            (r"ff\.bias", "out_bias"),
        ),
        relayout=join_experts,
    )
}
