"""InLine-CSwin: LeapLabTHU/InLine, with the names of microsoft/CSWin-Transformer."""

from torch import Tensor

from heedful.authors.agent_cswin import CSWIN
from heedful.authors.table import Table


def _relayout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where a convolution is predicted the attention is injective, with modules of other names."""
    linear = {name.partition("cores.")[0] for name in state if "cores.0.residual." in name}
    return {
        name.replace("cores.0.dwc.", "core.lepe.").replace("cores.0.", "core.")
        if name.partition("cores.")[0] in linear
        else name: value
        for name, value in state.items()
    }


TABLES = {"InLineCSwin": Table(rename=CSWIN, relayout=_relayout)}
