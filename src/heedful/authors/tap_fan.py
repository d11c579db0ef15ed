"""TAP-FAN: guoyongcs/TAPADL."""

from torch import Tensor

from heedful.authors import fan
from heedful.authors.table import Table, inside

_CHANNELS = fan.TABLES["ChannelProcessing"]
_BLOCK = (
    (r"((?:.*\.)?)(gamma[12])", r"\1\2.gamma"),
    (r"((?:.*\.)?)dilation_predictor\.(.*)", r"\1pool.\2"),
)


def _modules(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return inside(r"blocks\.\d+\.mlp\.", _CHANNELS)(state)


TABLES = {
    "Block": Table(rename=_BLOCK, relayout=inside(r"mlp\.", _CHANNELS)),
    "TAPFAN": Table(
        rename=(
            (r"cls_token", "class_token"),
            (r"pos_embed\.token_projection\.(.*)", r"positions.projection.\1"),
            (r"patch_embed\.proj\.(\d)\.0\.(.*)", r"stem.\1.conv.\2"),
            (r"patch_embed\.proj\.(\d)\.1\.(.*)", r"stem.\1.norm.\2"),
            (r"cls_attn_blocks\.(\d)\.attn\.q\.(.*)", r"class_blocks.\1.attn.query.\2"),
            (r"cls_attn_blocks\.(\d)\.attn\.k\.(.*)", r"class_blocks.\1.attn.key.\2"),
            (r"cls_attn_blocks\.(\d)\.attn\.v\.(.*)", r"class_blocks.\1.attn.value.\2"),
            (r"cls_attn_blocks\.(\d)\.attn\.proj\.(.*)", r"class_blocks.\1.attn.out.\2"),
            (r"cls_attn_blocks\.(\d)\.(gamma[12])", r"class_blocks.\1.\2.gamma"),
            (r"cls_attn_blocks\.(.*)", r"class_blocks.\1"),
            *_BLOCK,
        ),
        relayout=_modules,
    ),
}
