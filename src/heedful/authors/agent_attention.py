"""Agent attention: LeapLabTHU/Agent-Attention."""

from heedful.authors.table import Table

_CORE = ((r"([achnw]{2}_bias)", r"core.\1"), (r"(?:dwc|get_v)\.(.*)", r"core.dwc.\1"))

TABLES = {
    "AgentAttention": Table(rename=_CORE),
    "AgentAttentionDeiT": Table(rename=_CORE),
    "AgentAttentionPVT": Table(rename=_CORE),
    "AgentAttentionCSwin": Table(
        rename=tuple(
            (rf"attns\.{i}\.{theirs}", ours.replace("core", name))
            for i, name in enumerate(("upright", "level"))
            for theirs, ours in _CORE
        )
    ),
    "AgentCore": Table(rename=((r"get_v\.(.*)", r"dwc.\1"),)),
}
