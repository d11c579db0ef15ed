"""EViT: youweiliang/evit, and timm's DeiT of the same names."""

from heedful.authors.inline_deit import DEIT
from heedful.authors.table import Table

TABLES = {"EViT": Table(rename=DEIT)}
