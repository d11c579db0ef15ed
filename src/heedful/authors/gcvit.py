"""GC ViT and its window attentions: NVlabs/GCVit."""

import re

from torch import Tensor

from heedful.authors.table import Table

_PLACES = r"(.*\.|)relative_position_index"  # computed here
_PARTS = (
    (r"(^|\.)q_global_gen\.to_q_global\.", r"\1generator.convs."),
    (r"(^|\.)to_q_global\.", r"\1convs."),
    (r"\.conv\.0\.", ".conv.depthwise."),
    (r"\.conv\.2\.fc\.0\.", ".conv.squeeze."),
    (r"\.conv\.2\.fc\.2\.", ".conv.excite."),
    (r"\.conv\.3\.", ".conv.pointwise."),
    (r"(convs\.\d+)\.conv\.", r"\1."),
    (r"\.attn\.", ".mixer."),
    (r"relative_position_bias_table$", "relative_bias"),
    (r"\.gamma([12])$", r".scale\1.gamma"),
    (r"^patch_embed\.proj\.", "stem."),
    (r"^patch_embed\.conv_down\.", "downsample.0."),
    (r"^levels\.", "stages."),
)


def _names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors halve the map at the end of a stage, heedful before the next one."""
    ours = {}
    for name, value in state.items():
        name = re.sub(r"^levels\.(\d+)\.downsample\.", lambda at: f"downsample.{int(at[1]) + 1}.", name)
        for pattern, replacement in _PARTS:
            name = re.sub(pattern, replacement, name)
        ours[name] = value
    return ours


_TABLE = Table(drop=(_PLACES,), relayout=_names)

TABLES = {
    "GCViT": _TABLE,
    "Stage": _TABLE,
    "GCViTWindowAttention": _TABLE,
    "GlobalQueryWindowAttention": _TABLE,
    "GlobalQueryGenerator": _TABLE,
}
