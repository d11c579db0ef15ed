"""Mixture-of-head attention without parameters: SkyworkAI/MoH, one `self_attn` of its LLaMA3-8B."""

from heedful.authors.table import Table

TABLES = {
    "MixtureOfHeadLlamaAttention": Table(
        rename=(
            (r"q_proj\.(.*)", r"query.\1"),
            (r"k_proj\.(.*)", r"key.\1"),
            (r"v_proj\.(.*)", r"value.\1"),
            (r"o_proj\.(.*)", r"out.\1"),
        )
    )
}
