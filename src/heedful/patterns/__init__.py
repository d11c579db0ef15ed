"""Who sees whom, known before the data: one pattern a file, joined with &, | and ~."""

from heedful.patterns.causal import Causal
from heedful.patterns.full import Full
from heedful.patterns.pattern import Pattern
from heedful.patterns.sink import Sink
from heedful.patterns.window import Window

__all__ = ["Causal", "Full", "Pattern", "Sink", "Window"]
