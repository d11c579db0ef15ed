"""BEVANet and its mixers: maomao0819/BEVANet."""

from heedful.authors.table import Table

STRIPS = (
    (r"DW_conv_h\.dwconv\.(.*)", r"near_row.\1"),
    (r"DW_conv_v\.dwconv\.(.*)", r"near_column.\1"),
    (r"DW_D_conv_h\.dwconv\.(.*)", r"far_row.\1"),
    (r"DW_D_conv_v\.dwconv\.(.*)", r"far_column.\1"),
    (r"pwconv\.pwconv\.(.*)", r"mix.\1"),
)
SELECT = (
    (r"fc_reduce\.(\d)\.(?:pwconv\.|dwconv\.)?(.*)", r"reduce.\1.\2"),
    (r"fc_expand_small\.(\d)\.(?:pwconv\.|dwconv\.)?(.*)", r"expand.0.\1.\2"),
    (r"fc_expand_big_h\.(\d)\.(?:pwconv\.|dwconv\.)?(.*)", r"expand.1.\1.\2"),
    (r"fc_expand_big_v\.(\d)\.(?:pwconv\.|dwconv\.)?(.*)", r"expand.2.\1.\2"),
    (r"conv_squeeze\.(.*)", r"places.\1"),
)
WEIGHED = (
    (r"DW_conv\.dwconv\.(.*)", r"near.\1"),
    (r"DW_D_conv_h\.dwconv\.(.*)", r"row.\1"),
    (r"DW_D_conv_v\.dwconv\.(.*)", r"column.\1"),
    (r"pwconv\.pwconv\.(.*)", r"mix.\1"),
    *((rf"FS_kernel\.{theirs}", f"select.{ours}") for theirs, ours in SELECT),
)


def attention(gate: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Renames of the attention around a gate."""
    return (
        (r"proj_1\.pwconv\.(.*)", r"proj_in.\1"),
        (r"proj_2\.pwconv\.(.*)", r"proj_out.\1"),
        *((rf"spatial_gating_unit\.{theirs}", f"gate.{ours}") for theirs, ours in gate),
    )


BLOCK = (
    (r"layer_scale_(\d)", r"scale\1.gamma"),
    *((rf"attn\.{theirs}", f"mixer.{ours}") for theirs, ours in attention(WEIGHED)),
    (r"mlp\.(fc\d|dwconv)\.(?:pwconv|dwconv)\.(.*)", r"mlp.\1.\2"),
)
POOLING = (
    (r"scale0\.(\d)\.(?:pwconv\.)?(.*)", r"scales.0.\1.\2"),
    *(
        (rf"scale{theirs}\.{at}\.(?:pwconv\.)?(.*)", rf"scales.{ours}.{at - 1}.\1")
        for ours, theirs in ((1, 1), (2, 2), (3, 4), (4, 5))
        for at in (1, 3)
    ),
    *(
        (rf"process{theirs}\.(.*)", rf"process.{ours}.\1")
        for ours, theirs in enumerate(("1", "2", "_lska", "4", "5"))
    ),
    (r"bn\.(.*)", r"norm.\1"),
    (r"layer_scale_lska", r"attention_scale.gamma"),
    *((rf"lska\.{theirs}", f"attention.{ours}") for theirs, ours in attention(STRIPS)),
    (r"compression\.(\d)\.(?:pwconv\.)?(.*)", r"join.\1.\2"),
    (r"shortcut\.(\d)\.(?:pwconv\.)?(.*)", r"shortcut.\1.\2"),
)
GUIDED = (
    (r"conv_p\.(.*)", r"detail.\1"),
    (r"conv_i\.(.*)", r"semantic.\1"),
    (r"out\.(.*)", r"join.\1"),
)
ALIKE = ((r"f_([xy])\.(.*)", r"of_\1.\2"),)

TABLES = {
    "LargeSeparableKernelAttention": Table(rename=STRIPS),
    "SparseDecomposedLargeSeparableKernelAttention": Table(rename=WEIGHED),
    "ComprehensiveKernelSelection": Table(rename=SELECT),
}
