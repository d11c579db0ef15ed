"""RALA and MALA: qhfan/RALA and qhfan/MALA, the classification models; their mixers have heedful's names."""

from torch import Tensor

from heedful.authors.table import Table

_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
_OURS = r"stages.\1.\2."


def _relayout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer scales and the head as they are used: a vector and a linear map."""
    flat = {name: t.flatten() if name.endswith(".gamma") else t for name, t in state.items()}
    if "head.weight" in flat:
        flat["head.weight"] = flat["head.weight"].flatten(1)
    return flat


TABLES = {
    "RankAugmentedLinearAttention": Table(),
    "RAVLT": Table(
        rename=(
            (r"patch_embed\.proj\.(.*)", r"downsample.0.\1"),
            *(
                (rf"layers\.{s}\.downsample\.{theirs}\.(.*)", rf"downsample.{s + 1}.{ours}.\1")
                for s in range(3)
                for theirs, ours in (("reduction", 0), ("norm", 1))
            ),
            (_BLOCK + r"norm([12])\.norm\.(.*)", _OURS + r"norm\3.\4"),
            (_BLOCK + r"gamma_([12])", _OURS + r"scale\3.gamma"),
            (_BLOCK + r"attn\.(.*)", _OURS + r"mixer.\3"),
            (_BLOCK + r"ffn\.(.*)", _OURS + r"mlp.\3"),
            (_BLOCK + r"pos\.(.*)", _OURS + r"positions.\3"),
        ),
        drop=(r"layers\.\d+\.RoPE\.angle",),
        relayout=_relayout,
    ),
}
