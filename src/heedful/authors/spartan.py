"""SpaRTAN and its mixers: henry-pay/SpaRTAN."""

import re

from torch import Tensor

from heedful.authors.table import Table

SPATIAL = (
    (r"(h_conv|l_conv\.1)\.conv\.(.*)", r"\1.0.\2"),
    (r"(h_conv|l_conv\.1)\.norm\.(.*)", r"\1.1.\2"),
    (r"l_conv\.0\.conv\.(.*)", r"l_conv.0.\1"),
    (r"(.*)\.squeeze\.(.*)", r"\1.fc1.\2"),
    (r"(.*)\.expand\.(.*)", r"\1.fc2.\2"),
)
CHANNEL = (
    (r"complex", r"turn"),
    (r"proj\.(.*)", r"weight.\1"),
    (r"conv\.conv\.(.*)", r"conv.0.\1"),
    (r"conv\.norm\.(.*)", r"conv.1.\1"),
    (r"attn\.squeeze\.(.*)", r"gate.fc1.\1"),
    (r"attn\.expand\.(.*)", r"gate.fc2.\1"),
)
PLACES = {"h_conv": "near", "l_conv": "wide", "h_attn": "near_gate", "l_attn": "wide_gate"}


def spatial(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors call the near branch h and the wide one l; gamma has an axis for the batch."""
    ours = {}
    for name, value in state.items():
        first, dot, rest = name.partition(".")
        ours[PLACES.get(first, first) + dot + rest] = value[0] if name == "gamma" else value
    return ours


def channel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The complex numbers have axes for batch, height and width."""
    return {name: value.flatten(0, 3) if name == "turn" else value for name, value in state.items()}


SMIXER = Table(rename=SPATIAL, relayout=spatial)
CMIXER = Table(rename=CHANNEL, relayout=channel)


def model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' blocks and mergings stand in one list; here a merging opens its stage."""
    mergings = sorted(
        int(found[1]) for name in state if (found := re.fullmatch(r"layers\.(\d+)\.conv\.weight", name))
    )
    starts = [0, *mergings]
    ours: dict[str, Tensor] = {}
    mixers: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if found := re.fullmatch(r"conv\.(\d)\.(conv|norm)\.(.*)", name):
            ours[f"stem.{found[1]}.{['conv', 'norm'].index(found[2])}.{found[3]}"] = value
        elif found := re.fullmatch(r"layers\.(\d+)\.(.*)", name):
            number, rest = int(found[1]), found[2]
            stage = max(s for s, start in enumerate(starts) if start <= number)
            if number in mergings:
                ours[f"stages.{stage}.0.{rest}"] = value
                continue
            # A merging and its activation stand before the blocks of a later stage.
            block = f"stages.{stage}.{number - starts[stage] + (1 if stage else 0)}."
            if inner := re.fullmatch(r"([sc]mixer\.)(.*)", rest):
                mixers.setdefault(block + inner[1], {})[inner[2]] = value
            else:
                ours[block + re.sub(r"^(norm|scale)_", r"\1", rest)] = value
        else:
            ours[name] = value
    for place, theirs in mixers.items():
        table = SMIXER if place.endswith("smixer.") else CMIXER
        ours.update({place + name: value for name, value in table.apply(theirs).items()})
    return ours


TABLES = {
    "MultiOrderSpatialMixer": SMIXER,
    "WaveChannelMixer": CMIXER,
    "SpaRTAN": Table(rename=((r"linear\.(.*)", r"head.\1"),), relayout=model),
}
