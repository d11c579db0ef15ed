"""Grouped differential attention: one `self_attn` of Motif's language models."""

from heedful.authors.table import Table

TABLES = {
    "GroupedDifferentialAttention": Table(
        rename=(
            (r"q_proj\.(.*)", r"query.\1"),
            (r"k_proj\.(.*)", r"key.\1"),
            (r"v_proj\.(.*)", r"value.\1"),
            (r"o_proj\.(.*)", r"out.\1"),
            (r"subln\.(.*)", r"norm.\1"),
        )
    )
}
