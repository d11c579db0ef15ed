"""HaloNet: the authors released no code; these are the names of timm's layer and model."""

from heedful.authors.table import Table

TABLES = {
    "HaloNet": Table(
        rename=(
            (r"stem\.conv1\.conv\.(.*)", r"stem.0.conv.\1"),
            (r"stem\.conv1\.bn\.(.*)", r"stem.0.norm.\1"),
            (r"final_conv\.conv\.(.*)", r"final.0.conv.\1"),
            (r"final_conv\.bn\.(.*)", r"final.0.norm.\1"),
            (r"(stages\.\d+\.\d+)\.conv1_1x1\.conv\.(.*)", r"\1.conv1.conv.\2"),
            (r"(stages\.\d+\.\d+)\.conv1_1x1\.bn\.(.*)", r"\1.conv1.norm.\2"),
            (r"(stages\.\d+\.\d+)\.self_attn\.(.*)", r"\1.mixer.\2"),
            (r"(stages\.\d+\.\d+)\.post_attn\.(.*)", r"\1.norm.\2"),
            (r"(stages\.\d+\.\d+)\.conv3_1x1\.conv\.(.*)", r"\1.conv2.conv.\2"),
            (r"(stages\.\d+\.\d+)\.conv3_1x1\.bn\.(.*)", r"\1.conv2.norm.\2"),
            (r"(stages\.\d+\.\d+)\.shortcut\.bn\.(.*)", r"\1.shortcut.norm.\2"),
            (r"head\.fc\.(.*)", r"head.\1"),
        )
    ),
    "HaloAttention": Table(),
}
