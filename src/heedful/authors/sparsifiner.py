"""Sparsifiner: lim142857/Sparsifiner."""

from heedful.authors.inline_deit import DEIT
from heedful.authors.table import Table

PREDICTOR = (
    (r"mask_predictor\.proj_c_q\.(.*)", r"predictor.query.\1"),
    (r"mask_predictor\.proj_c_k\.(.*)", r"predictor.key.\1"),
    (r"mask_predictor\.proj_n", r"predictor.reduce"),
    (r"mask_predictor\.proj_back_n", r"predictor.expand"),
)
_ATTENTION = r"blocks\.(\d+)\.attn\."

TABLES = {
    "SparsifinerAttention": Table(rename=PREDICTOR),
    "Sparsifiner": Table(
        rename=(
            *(
                (_ATTENTION + theirs, r"blocks.\1.mixer." + ours.replace(r"\1", r"\2"))
                for theirs, ours in PREDICTOR
            ),
            *DEIT,
        )
    ),
}
