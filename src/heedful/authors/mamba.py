"""Mamba: state-spaces/mamba (`mamba_simple.Mamba`)."""

from heedful.authors.table import Table

TABLES = {
    "Mamba": Table(
        rename=(
            (r"in_proj\.weight", "enter.weight"),
            (r"conv1d\.(weight|bias)", r"conv.\1"),
            (r"x_proj\.weight", "read.weight"),
            (r"dt_proj\.(weight|bias)", r"step.\1"),
            ("A_log", "log_rate"),
            ("D", "skip"),
            (r"out_proj\.weight", "out.weight"),
        )
    )
}
