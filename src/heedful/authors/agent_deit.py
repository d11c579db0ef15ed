"""Agent-DeiT: LeapLabTHU/Agent-Attention."""

from heedful.authors.inline_deit import DEIT
from heedful.authors.table import Table

TABLES = {
    "AgentDeiT": Table(
        rename=((r"blocks\.(\d+)\.attn\.(dwc\..*|[achnw]{2}_bias)", r"blocks.\1.mixer.core.\2"), *DEIT)
    )
}
