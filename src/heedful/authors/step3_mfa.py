"""Multi-matrix factorization attention: one `self_attn` of Step-3, where `q_proj` is the way down."""

from heedful.authors.table import Table

TABLES = {
    "MultiMatrixFactorizationAttention": Table(
        rename=(
            (r"q_proj\.(.*)", r"query_down.\1"),
            (r"inter_norm\.(.*)", r"query_norm.\1"),
            (r"wq\.(.*)", r"query_up.\1"),
            (r"k_proj\.(.*)", r"key.\1"),
            (r"v_proj\.(.*)", r"value.\1"),
            (r"o_proj\.(.*)", r"out.\1"),
        )
    )
}
