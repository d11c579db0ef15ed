"""The parts of BEVANet: maomao0819/BEVANet."""

from heedful.authors.bevanet import ALIKE, BLOCK, GUIDED, POOLING
from heedful.authors.table import Table

TABLES = {
    "EVABlock": Table(rename=BLOCK),
    "PyramidPooling": Table(rename=POOLING),
    "BoundaryGuidedFusion": Table(rename=GUIDED),
    "PixelAttentionFusion": Table(rename=ALIKE),
}
