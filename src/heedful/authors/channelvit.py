"""ChannelViT: insitro/ChannelViT, the plain class and that with hierarchical channel sampling."""

from torch import Tensor

from heedful.authors.table import Table


def _flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projection is a three-dimensional convolution there; the plain class has channels in columns."""
    ours = {}
    for name, value in state.items():
        if name == "patches.proj.weight" and value.ndim == 5:
            value = value[:, :, 0]
        if name == "channel_embed.weight" and value.ndim == 5:
            value = value[0, :, :, 0, 0].T
        ours[name] = value
    return ours


TABLES = {
    "ChannelViT": Table(
        rename=(
            (r"cls_token", "class_token"),
            (r"pos_embed", "positions"),
            (r"patch_embed\.proj\.(.*)", r"patches.proj.\1"),
            (r"patch_embed\.channel_embed(\.weight)?", "channel_embed.weight"),
            (r"blocks\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
        ),
        relayout=_flat,
    )
}
