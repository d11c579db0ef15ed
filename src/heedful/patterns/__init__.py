"""Who sees whom, known before the data: one pattern a file, joined with &, | and ~."""

from heedful.patterns.blocks import Blocks
from heedful.patterns.causal import Causal
from heedful.patterns.documents import Documents
from heedful.patterns.full import Full
from heedful.patterns.global_tokens import Global
from heedful.patterns.grid import Grid
from heedful.patterns.halo import Halo
from heedful.patterns.neighborhood import Neighborhood
from heedful.patterns.pattern import Pattern
from heedful.patterns.per_head import PerHead
from heedful.patterns.prefix_lm import PrefixLM
from heedful.patterns.sink import Sink
from heedful.patterns.strided import Strided
from heedful.patterns.window import Window

__all__ = [
    "Blocks",
    "Causal",
    "Documents",
    "Full",
    "Global",
    "Grid",
    "Halo",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "PrefixLM",
    "Sink",
    "Strided",
    "Window",
]
