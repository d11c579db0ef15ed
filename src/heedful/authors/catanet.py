"""CATANet and its mixers: EquationWalker/CATANet."""

import re

from torch import Tensor

from heedful.authors.table import Table

PROJECTIONS = ((r"to_q", "query"), (r"to_k", "key"), (r"to_v", "value"), (r"proj", "proj"))
FFN = (
    (r"norm\.(.*)", r"ffn_norm.\1"),
    (r"fn\.dwconv\.depthwise_conv\.0\.(.*)", r"ffn.dwconv.\1"),
    (r"fn\.(fc\d)\.(.*)", r"ffn.\1.\2"),
)
TOKENS = (
    (r"means", r"centres"),
    (r"initted", r"started"),
    *((rf"mlp\.{theirs}", ours) for theirs, ours in FFN),
    *((rf"iasa_attn\.{theirs}\.(.*)", rf"attention.{ours}.\1") for theirs, ours in PROJECTIONS),
    (r"irca_attn\.to_k\.(.*)", r"centre_key.\1"),
    (r"irca_attn\.to_v\.(.*)", r"centre_value.\1"),
    (r"conv1x1\.(.*)", r"mix.\1"),
)
PATCHES = (
    (r"layer\.0\.norm\.(.*)", r"norm.\1"),
    *((rf"layer\.0\.fn\.{theirs}\.(.*)", rf"attention.{ours}.\1") for theirs, ours in PROJECTIONS),
    *((rf"layer\.1\.{theirs}", ours) for theirs, ours in FFN),
)
NET = (
    (r"first_conv\.(.*)", r"first.\1"),
    (r"last_conv\.(.*)", r"last.\1"),
    (r"mid_convs\.(\d+)\.(.*)", r"blocks.\1.2.\2"),
    (r"upconv1?\.(.*)", r"enlarge.0.\1"),
    (r"upconv2\.(.*)", r"enlarge.3.\1"),
)


def linear(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last map of the tokens is a 1 x 1 convolution there."""
    return {name: value.flatten(1) if name.endswith("mix.weight") else value for name, value in state.items()}


def model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A block holds both mixers, and here its convolution."""
    tables = {"0": Table(rename=TOKENS), "1": Table(rename=PATCHES)}
    ours = {}
    for name, value in state.items():
        if found := re.fullmatch(r"(blocks\.\d+\.)([01])\.(.*)", name):
            name = f"{found[1]}{found[2]}.{tables[found[2]].name(found[3])}"
        ours[name] = value
    return linear(ours)


TABLES = {
    "TokenAggregationBlock": Table(rename=TOKENS, relayout=linear),
    "LocalRegionSelfAttention": Table(rename=PATCHES),
    "CATANet": Table(rename=NET, relayout=model),
}
