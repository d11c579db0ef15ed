"""DaViT and its two attentions: dingmyu/davit, and timm's port."""

from heedful.authors.table import Table

_BLOCK = (
    (r"(.*)cpe\.0\.proj\.(.*)", r"\1positions1.\2"),
    (r"(.*)cpe\.1\.proj\.(.*)", r"\1positions2.\2"),
    (r"(.*)attn\.(.*)", r"\1mixer.\2"),
)
_TIMM = (
    (r"stem\.conv\.(.*)", r"downsample.0.proj.\1"),
    (r"stem\.norm\.(.*)", r"downsample.0.norm.\1"),
    (r"stages\.(\d+)\.downsample\.conv\.(.*)", r"downsample.\1.proj.\2"),
    (r"stages\.(\d+)\.downsample\.norm\.(.*)", r"downsample.\1.norm.\2"),
    (r"stages\.(\d+)\.blocks\.(\d+\.\d+)\.cpe([12])\.proj\.(.*)", r"stages.\1.\2.positions\3.\4"),
    (r"stages\.(\d+)\.blocks\.(\d+\.\d+)\.attn\.(.*)", r"stages.\1.\2.mixer.\3"),
    (r"stages\.(\d+)\.blocks\.(.*)", r"stages.\1.\2"),
    (r"head\.norm\.(.*)", r"norm.\1"),
    (r"head\.fc\.(.*)", r"head.\1"),
)
_STAGE = r"main_blocks\.(\d+\.\d+\.\d+\.)"

TABLES = {
    "DaViT": Table(
        rename=(
            (r"patch_embeds\.(.*)", r"downsample.\1"),
            *((_STAGE + theirs.removeprefix("(.*)"), rf"stages.{ours}") for theirs, ours in _BLOCK),
            (_STAGE + r"(.*)", r"stages.\1\2"),
            (r"norms\.(.*)", r"norm.\1"),
            *_TIMM,
        )
    ),
    "Block": Table(rename=_BLOCK),
    "ChannelGroupAttention": Table(),
    "DaViTWindowAttention": Table(),
}
