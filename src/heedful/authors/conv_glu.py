"""The gated feed-forward net of TransNeXt: DaiShiResearch/TransNeXt."""

from heedful.authors.table import Table
from heedful.authors.transnext import CONV_GLU

TABLES = {"ConvGLU": Table(rename=CONV_GLU)}
