"""Who sees whom, known before the data: one pattern a file, joined with &, | and ~."""

from heedful.patterns.blocks import Blocks
from heedful.patterns.causal import Causal
from heedful.patterns.composite import Composite
from heedful.patterns.documents import Documents
from heedful.patterns.elastic_span import ElasticSpan
from heedful.patterns.full import Full
from heedful.patterns.global_tokens import Global
from heedful.patterns.grid import Grid
from heedful.patterns.halo import Halo
from heedful.patterns.inward_window import InwardWindow
from heedful.patterns.local_stride import LocalStride, RelativeStride
from heedful.patterns.neighborhood import Neighborhood
from heedful.patterns.pattern import Pattern
from heedful.patterns.per_head import PerHead
from heedful.patterns.power import Power
from heedful.patterns.prefix_lm import PrefixLM
from heedful.patterns.quadrant_window import QuadrantWindow
from heedful.patterns.radial import Radial
from heedful.patterns.sink import Sink
from heedful.patterns.sink_window import SinkWindow
from heedful.patterns.split_windows import SplitWindows
from heedful.patterns.strided import Strided
from heedful.patterns.window import Window

__all__ = [
    "Blocks",
    "Causal",
    "Composite",
    "Documents",
    "ElasticSpan",
    "Full",
    "Global",
    "Grid",
    "Halo",
    "InwardWindow",
    "LocalStride",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "Power",
    "PrefixLM",
    "QuadrantWindow",
    "Radial",
    "RelativeStride",
    "Sink",
    "SinkWindow",
    "SplitWindows",
    "Strided",
    "Window",
]
