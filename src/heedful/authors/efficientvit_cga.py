"""EfficientViT and its cascaded group attention: microsoft/Cream, folder EfficientViT, and timm's port."""

from torch import Tensor

from heedful.authors.shvit import RENAME, stages
from heedful.authors.table import Table

_PLACES = r"(?:.*\.|)attention_bias_idxs"  # computed here


def _convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released checkpoints may hold 1 x 1 convolutions as matrices."""
    return {
        n: t[:, :, None, None] if n.endswith(".c.weight") and t.ndim == 2 else t for n, t in state.items()
    }


_TIMM = (
    *((rf"patch_embed\.conv{number + 1}\.(.*)", rf"stem.{2 * number}.\1") for number in range(4)),
    (r"(stages\.\d+\.downsample\.)res1\.0\.(.*)", r"\g<1>0.\2"),
    (r"(stages\.\d+\.downsample\.)res1\.1\.(.*)", r"\g<1>1.\2"),
    (r"(stages\.\d+\.downsample\.)patchmerge\.(.*)", r"\g<1>2.\2"),
    (r"(stages\.\d+\.downsample\.)res2\.0\.(.*)", r"\g<1>3.\2"),
    (r"(stages\.\d+\.downsample\.)res2\.1\.(.*)", r"\g<1>4.\2"),
    (r"(.*\.mixer\.m)\.attn\.(.*)\.conv\.weight", r"\1.\2.c.weight"),
    (r"head\.linear\.(.*)", r"head.\1"),
)

TABLES = {
    "EfficientViT": Table(
        rename=(*_TIMM, (r"(.*\.mixer\.m)\.attn\.(.*)", r"\1.\2"), *RENAME),
        drop=(_PLACES,),
        relayout=lambda state: stages(_convolutions(state)),
    ),
    "CascadedGroupAttention": Table(
        rename=((r"attn\.(.*)", r"\1"),), drop=(_PLACES,), relayout=_convolutions
    ),
}
