"""Compressed convolutional attention: one `self_attn` of Zyphra's ZAYA1, as transformers names it."""

from heedful.authors.table import Table

TABLES = {
    "CompressedConvolutionalAttention": Table(
        rename=(
            (r"qkv_proj\.q_proj\.(.*)", r"query.\1"),
            (r"qkv_proj\.k_proj\.(.*)", r"key.\1"),
            (r"qkv_proj\.v_proj_current\.(.*)", r"value.\1"),
            (r"qkv_proj\.v_proj_delayed\.(.*)", r"value_delayed.\1"),
            (r"qkv_proj\.conv_qk_depthwise\.(.*)", r"channel_conv.\1"),
            (r"qkv_proj\.conv_qk_grouped\.(.*)", r"head_conv.\1"),
            (r"qk_norm\.temp", "temp"),
            (r"o_proj\.(.*)", r"out.\1"),
        )
    )
}
