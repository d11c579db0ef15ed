"""Gated attention: qiuzh20/gated_attention, one `self_attn` of its Qwen3.

The authors keep the rows of the gate between those of the queries, KV head after KV head, and so does
heedful (gate_position "output").
"""

from heedful.authors.table import Table

TABLES = {
    "GatedAttention": Table(
        rename=(
            (r"q_proj\.(.*)", r"query.\1"),
            (r"k_proj\.(.*)", r"key.\1"),
            (r"v_proj\.(.*)", r"value.\1"),
            (r"o_proj\.(.*)", r"out.\1"),
            (r"q_norm\.(.*)", r"query_norm.\1"),
            (r"k_norm\.(.*)", r"key_norm.\1"),
        )
    )
}
