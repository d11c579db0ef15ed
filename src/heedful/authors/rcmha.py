"""RCMHA: hermansh-id/rcmha, one attention module."""

from heedful.authors.table import Table

TABLES = {
    "RelativeConvMultiHeadAttention": Table(
        rename=(
            (r"(query|key|value)\.0\.linear\.(.*)", r"\1.\2"),
            (r"(query|key|value)\.1\.conv\.(.*)", r"\1_conv.\2"),
            ("key_pos_embeddings", "position"),
            ("key_pos_bias", "position_bias"),
            ("query_pos_bias", "query_bias"),
            (r"output\.(.*)", r"out.\1"),
        )
    )
}
