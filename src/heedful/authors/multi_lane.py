"""MULTI-LANE: tdemin16/multi-lane. What is not a prompt or a selector has timm's names."""

from heedful.authors.table import Table

TABLES = {
    "SummarizedPathwayAttention": Table(),
    "Block": Table(),
    "MultiLaneViT": Table(
        rename=(
            (r"cls_token", "class_token"),
            (r"pos_embed", "positions"),
            (r"patch_embed\.proj\.(.*)", r"embed.\1"),
        )
    ),
}
