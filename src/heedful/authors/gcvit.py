"""GC ViT and its window attentions: NVlabs/GCVit, and timm's port."""

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
    # timm's
    (r"^stem\.conv1\.", "stem."),
    (r"^stem\.down\.", "downsample.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample.\1."),
    (r"\.conv_block\.", ".conv."),
    (r"\.conv_dw\.", ".depthwise."),
    (r"\.se\.fc1\.", ".squeeze."),
    (r"\.se\.fc2\.", ".excite."),
    (r"\.conv_pw\.", ".pointwise."),
    (r"\.rel_pos\.", "."),
    (r"\.ls([12])\.gamma$", r".scale\1.gamma"),
    (r"^stages\.3\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def _names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors halve the map at the end of a stage, heedful before the next one."""
    ours = {}
    for name, value in state.items():
        name = re.sub(r"^levels\.(\d+)\.downsample\.", lambda at: f"downsample.{int(at[1]) + 1}.", name)
        name = re.sub(
            r"\.global_block\.blocks\.conv(\d+)\.", lambda at: f".generator.convs.{int(at[1]) - 1}.", name
        )
        for pattern, replacement in _PARTS:
            name = re.sub(pattern, replacement, name)
        linear = name.endswith((".squeeze.weight", ".excite.weight"))  # timm's are 1 x 1 convolutions
        ours[name] = value.flatten(1) if linear else value
    return ours


_TABLE = Table(drop=(_PLACES,), relayout=_names)

TABLES = {
    "GCViT": _TABLE,
    "Stage": _TABLE,
    "GCViTWindowAttention": _TABLE,
    "GlobalQueryWindowAttention": _TABLE,
    "GlobalQueryGenerator": _TABLE,
}
