"""FocalNet and its modulation: microsoft/FocalNet."""

import re

from torch import Tensor

from heedful.authors.table import Table

_STAGE = r"layers\.(\d+)\.blocks\.(\d+\.)"


def _downsample(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors halve the map at the end of a stage, heedful before the next one."""
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda at: f"downsample.{int(at[1]) + 1}", name): value
        for name, value in state.items()
    }


TABLES = {
    "FocalNet": Table(
        rename=(
            (r"patch_embed\.(.*)", r"downsample.0.\1"),
            (_STAGE + r"modulation\.(.*)", r"stages.\1.\2mixer.\3"),
            (_STAGE + r"gamma_([12])", r"stages.\1.\2scale\3.gamma"),
            (_STAGE + r"(.*)", r"stages.\1.\2\3"),
        ),
        relayout=_downsample,
    ),
    "FocalModulation": Table(),
}
