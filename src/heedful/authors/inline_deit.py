"""InLine-DeiT: LeapLabTHU/InLine."""

from heedful.authors.table import Table

DEIT = (
    (r"cls_token", "class_token"),
    (r"pos_embed", "positions"),
    (r"patch_embed\.proj\.(.*)", r"embed.\1"),
    (r"blocks\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
)

TABLES = {"InLineDeiT": Table(rename=DEIT)}
