"""Mixture-of-head attention on maps: SkyworkAI/MoH, one `attn` of its TransNeXt (MoH-ViT)."""

from heedful.authors.moh import GATE
from heedful.authors.table import Table
from heedful.authors.transnext import AGGREGATED, POSITIONS, flat_convolution

TABLES = {
    "MixtureOfHeadVisionAttention": Table(rename=(*GATE, *POSITIONS)),
    "MixtureOfHeadAggregatedAttention": Table(rename=(*GATE, *AGGREGATED), relayout=flat_convolution),
}
