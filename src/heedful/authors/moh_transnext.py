"""MoH-ViT: SkyworkAI/MoH."""

from heedful.authors.moh import GATE
from heedful.authors.table import Table
from heedful.authors.transnext import AGGREGATED, flat_convolution, frame

TABLES = {"MoHTransNeXt": Table(rename=frame((*GATE, *AGGREGATED)), relayout=flat_convolution)}
