"""DaViT and its two attentions: dingmyu/davit."""

from heedful.authors.table import Table

_BLOCK = (
    (r"(.*)cpe\.0\.proj\.(.*)", r"\1positions1.\2"),
    (r"(.*)cpe\.1\.proj\.(.*)", r"\1positions2.\2"),
    (r"(.*)attn\.(.*)", r"\1mixer.\2"),
)
_STAGE = r"main_blocks\.(\d+\.\d+\.\d+\.)"

TABLES = {
    "DaViT": Table(
        rename=(
            (r"patch_embeds\.(.*)", r"downsample.\1"),
            *((_STAGE + theirs.removeprefix("(.*)"), rf"stages.{ours}") for theirs, ours in _BLOCK),
            (_STAGE + r"(.*)", r"stages.\1\2"),
            (r"norms\.(.*)", r"norm.\1"),
        )
    ),
    "Block": Table(rename=_BLOCK),
    "ChannelGroupAttention": Table(),
    "DaViTWindowAttention": Table(),
}
