"""Strided neighborhoods: the same call as for the paper before it."""

from __future__ import annotations

from typing import Any

from tests.parity.faster_neighborhood_attention import faster_neighborhood_attention
from tests.parity.harness import Tensors, adapter


@adapter("gna")
def gna(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    """Cases with stride > 1; masks in bits and outputs as in faster-neighborhood-attention."""
    return faster_neighborhood_attention(config, params, inputs)
