"""Every check of a mixer, by what it proves. Importing the files enters their checks into the list."""

from heedful.testing.mixer import (  # noqa: I001  the order in which checks run
    declarations,
    outputs,
    gradients,
    precision,
    batch,
    causality,
    masks,
    context,
    decoding,
    effects,
    copies,
    compilation,
    errors,
)
from heedful.testing.mixer.check import CHECKS, Check

__all__ = [
    "CHECKS",
    "Check",
    "batch",
    "causality",
    "compilation",
    "context",
    "copies",
    "declarations",
    "decoding",
    "effects",
    "errors",
    "gradients",
    "masks",
    "outputs",
    "precision",
]
