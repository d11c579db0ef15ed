"""Multi-head latent attention: one `mla` of AMD-AGI/AMD-Hybrid-Models, one `self_attn` of DeepSeek."""

from heedful.authors.table import Table

TABLES = {
    "MultiHeadLatentAttention": Table(
        rename=(
            (r"q_proj\.(.*)", r"query.\1"),
            (r"q_a_proj\.(.*)", r"query_down.\1"),
            (r"q_a_layernorm\.(.*)", r"query_norm.\1"),
            (r"q_b_proj\.(.*)", r"query_up.\1"),
            (r"kv_a_proj_with_mqa\.(.*)", r"kv_down.\1"),
            (r"kv_a_layernorm\.(.*)", r"kv_norm.\1"),
            (r"kv_b_proj\.(.*)", r"kv_up.\1"),
            (r"(?:o|out)_proj\.(.*)", r"out.\1"),
        )
    )
}
