"""MSA-Conv: zs670980918/MSA-Conv."""

from heedful.authors.table import Table

TABLES = {"MSAConv2d": Table(rename=((r"qkv_conv\.(.*)", r"qkv.\1"), (r"mlp\.(.*)", r"conv.\1")))}
