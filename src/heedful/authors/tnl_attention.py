"""TNL attention: OpenNLPLab/lightning-attention (`examples/module/tnl_attn.py`)."""

from heedful.authors.table import Table

TABLES = {
    "TNLAttention": Table(
        rename=(
            (r"q_proj\.(.*)", r"query.\1"),
            (r"k_proj\.(.*)", r"key.\1"),
            (r"v_proj\.(.*)", r"value.\1"),
            (r"o_proj\.(.*)", r"out.\1"),
            (r"output_gate\.(.*)", r"gate.\1"),
        )
    )
}
