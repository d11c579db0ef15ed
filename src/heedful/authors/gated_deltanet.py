"""Gated DeltaNet: hustvl/InfiniteVL (the linear layers' `self_attn`) and the layer of fla, same names."""

from heedful.authors.table import Table

TABLES = {
    "GatedDeltaNet": Table(
        rename=(
            (r"q_proj\.weight", "query.weight"),
            (r"k_proj\.weight", "key.weight"),
            (r"v_proj\.weight", "value.weight"),
            (r"g_proj\.weight", "gate.weight"),
            (r"a_proj\.weight", "step.weight"),
            (r"b_proj\.weight", "beta.weight"),
            (r"o_proj\.weight", "out.weight"),
            (r"q_conv1d\.weight", "query_conv.weight"),
            (r"k_conv1d\.weight", "key_conv.weight"),
            (r"v_conv1d\.weight", "value_conv.weight"),
            (r"o_norm\.weight", "norm.weight"),
            ("A_log", "log_rate"),
            ("dt_bias", "step_bias"),
        )
    )
}
