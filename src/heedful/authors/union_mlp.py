"""Union of Experts: YujiaoYang-work/UoE, a `U_MLP`, whose residual and norm are left to the block."""

from __future__ import annotations

from torch import Tensor

from heedful.authors.table import Table


def flat_bias(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first biases without their axis of tokens."""
    bias = theirs.get("inner_bias")
    return theirs if bias is None else {**theirs, "inner_bias": bias.flatten(1)}


TABLES = {
    "UnionMLP": Table(
        drop=(r"layer_norm\..*", r"linear3\..*"),  # linear3 is not used by the authors either
        rename=(
            (r"switch_gate\.w_gate\.(.*)", r"gate.linear.\1"),
            (r"linear1\.weight\.0", "inner"),
            (r"linear1\.bias\.0", "inner_bias"),
            (r"linear2\.weight\.0", "outer"),
            (r"linear2\.bias", "outer_bias"),
        ),
        relayout=flat_bias,
    )
}
