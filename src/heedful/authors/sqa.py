"""Sparse query attention: RxAI-dev/RxNN, rxnn.transformers.attention."""

from heedful.authors.table import Table

TABLES = {
    "SparseQueryAttention": Table(
        rename=(
            (r"q_proj\.(.*)", r"query.\1"),
            (r"k_proj\.(.*)", r"key.\1"),
            (r"v_proj\.(.*)", r"value.\1"),
            (r"out_proj\.(.*)", r"out.\1"),
        ),
        drop=(r"rope\.(inv_freq|cache)",),  # frequencies of base 10000 and their angles
    )
}
