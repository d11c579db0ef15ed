"""DHVT and its attention: ArieSeirack/DHVT."""

from heedful.authors.table import Table

ATTENTION = (
    (r"ht_proj\.(.*)", r"head_proj.\1"),
    (r"ht_norm\.(.*)", r"head_norm.\1"),
    (r"pos_embed", "head_positions"),
)
_MIXER = r"blocks\.(\d+)\.attn\."

TABLES = {
    "HeadInteractedAttention": Table(rename=ATTENTION),
    "DHVT": Table(
        rename=(
            (r"cls_token", "class_token"),
            *((_MIXER + a, r"blocks.\1.mixer." + b.replace(r"\1", r"\2")) for a, b in ATTENTION),
            (_MIXER + r"(.*)", r"blocks.\1.mixer.\2"),
            (r"patch_embed\.pre_affine\.(.*)", r"embed.before.\1"),
            (r"patch_embed\.post_affine\.(.*)", r"embed.after.\1"),
            *(
                (rf"patch_embed\.proj\.{2 * step}\.{part}\.(.*)", rf"embed.convs.{step}.{name}.\1")
                for step in range(4)
                for part, name in enumerate(("conv", "norm"))
            ),
        )
    ),
}
