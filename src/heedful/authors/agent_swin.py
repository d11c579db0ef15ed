"""Agent-Swin: LeapLabTHU/Agent-Attention."""

from heedful.authors.agent_attention import TABLES as MIXERS
from heedful.authors.inline_swin import MIXER, SWIN, UNLEARNED
from heedful.authors.table import Table, inside

TABLES = {"AgentSwin": Table(drop=UNLEARNED, rename=SWIN, relayout=inside(MIXER, MIXERS["AgentAttention"]))}
