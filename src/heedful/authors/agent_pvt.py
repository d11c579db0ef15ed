"""Agent-PVT: LeapLabTHU/Agent-Attention."""

from heedful.authors.agent_attention import TABLES as MIXERS
from heedful.authors.table import Table, inside

PVT = tuple(
    pair
    for s in range(4)
    for pair in (
        (rf"patch_embed{s + 1}\.(.*)", rf"downsample.{s}.\1"),
        (rf"pos_embed{s + 1}", f"positions.{s}"),
        (rf"block{s + 1}\.(\d+)\.attn\.(.*)", rf"stages.{s}.\1.mixer.\2"),
        (rf"block{s + 1}\.(.*)", rf"stages.{s}.\1"),
    )
)
MIXER = r"stages\.\d\.\d+\.mixer\."

TABLES = {"AgentPVT": Table(rename=PVT, relayout=inside(MIXER, MIXERS["AgentAttentionPVT"]))}
