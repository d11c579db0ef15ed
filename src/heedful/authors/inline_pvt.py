"""InLine-PVT: LeapLabTHU/InLine, where queries have a projection of their own."""

import torch
from torch import Tensor

from heedful.authors.agent_pvt import MIXER, PVT
from heedful.authors.table import Table, inside


def _joined(mixer: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {name: value for name, value in mixer.items() if name.split(".")[0] not in ("q", "kv")}
    ours.update(
        {f"qkv.{end}": torch.cat([mixer[f"q.{end}"], mixer[f"kv.{end}"]]) for end in ("weight", "bias")}
    )
    return ours


TABLES = {"InLinePVT": Table(rename=PVT, relayout=inside(MIXER, Table(relayout=_joined)))}
