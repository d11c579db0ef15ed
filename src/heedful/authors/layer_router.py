"""Flux attention: qqtang-code/FluxAttention, the `mask_allocator` of one attention layer."""

from heedful.authors.table import Table

TABLES = {
    "LayerRouter": Table(
        rename=(
            (r"cls_feat_extractor\.(.*)", r"features.\1"),
            (r"cls_router_head_agnostic\.(.*)", r"head.\1"),
        ),
        drop=("log_temp",),  # the temperature of training, by its schedule
    )
}
