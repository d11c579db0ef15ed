"""DuoFormer: xiaoyatang/duoformer_TCGA, its `vision_transformer`."""

from heedful.authors.table import Table

TABLES = {
    "MultiscaleFormer": Table(
        drop=(r"fc_norm\..*",),  # its result is thrown away
        rename=(
            (r"pos_embed_for_scale", "scale_positions"),
            (r"cls_token", "class_token"),
            (r"pos_embed", "positions"),
            (r"scaleBlocks\.(\d+)\.attn\.(.*)", r"scale_blocks.\1.mixer.\2"),
            (r"scaleBlocks\.(.*)", r"scale_blocks.\1"),
            (r"blocks\.(\d+)\.attn\.(.*)", r"patch_blocks.\1.\2"),
        ),
    )
}
