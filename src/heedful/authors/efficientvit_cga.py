"""EfficientViT and its cascaded group attention: microsoft/Cream, folder EfficientViT."""

from torch import Tensor

from heedful.authors.shvit import RENAME, stages
from heedful.authors.table import Table

_PLACES = r"(?:.*\.|)attention_bias_idxs"  # computed here


def _convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released checkpoints may hold 1 x 1 convolutions as matrices."""
    return {
        n: t[:, :, None, None] if n.endswith(".c.weight") and t.ndim == 2 else t for n, t in state.items()
    }


TABLES = {
    "EfficientViT": Table(
        rename=((r"(.*\.mixer\.m)\.attn\.(.*)", r"\1.\2"), *RENAME),
        drop=(_PLACES,),
        relayout=lambda state: stages(_convolutions(state)),
    ),
    "CascadedGroupAttention": Table(
        rename=((r"attn\.(.*)", r"\1"),), drop=(_PLACES,), relayout=_convolutions
    ),
}
