"""FocalNet and its modulation: microsoft/FocalNet, and timm's port."""

import re

from torch import Tensor

from heedful.authors.table import Table

_STAGE = r"layers\.(\d+)\.blocks\.(\d+\.)"


def _downsample(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors halve the map at the end of a stage, heedful and timm before the next one."""
    later = 1 if any(name.startswith("layers.0.downsample.") for name in state) else 0
    ours = {}
    for name, value in state.items():
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda at: f"downsample.{int(at[1]) + later}", name)
        linear = re.search(r"\.(mixer\.f|mixer\.proj|mlp\.fc[12])\.weight$", name)
        ours[name] = value.flatten(1) if linear else value  # some of timm's are 1 x 1 convolutions
    return ours


TABLES = {
    "FocalNet": Table(
        rename=(
            (r"(?:patch_embed|stem)\.(.*)", r"downsample.0.\1"),
            (_STAGE + r"modulation\.(.*)", r"stages.\1.\2mixer.\3"),
            (_STAGE + r"gamma_([12])", r"stages.\1.\2scale\3.gamma"),
            (_STAGE + r"ls([12])\.gamma", r"stages.\1.\2scale\3.gamma"),  # this and the next are timm's
            (_STAGE + r"norm([12])_post\.(.*)", r"stages.\1.\2norm\3.\4"),
            (_STAGE + r"(.*)", r"stages.\1.\2\3"),
            (r"head\.fc\.(.*)", r"head.\1"),
        ),
        relayout=_downsample,
    ),
    "FocalModulation": Table(),
}
