"""Interpolations between attention and the identity."""

from __future__ import annotations

from typing import Any

from heedful.steer.headhunter_softpag import PATHS
from tests.parity.harness import Tensors, adapter


def _inputs(config: Any, drawn: Tensors) -> Tensors:
    return {"attn": drawn["attn"].softmax(-1)}


@adapter("softpag-interpolation", inputs=_inputs)
def softpag(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    return {f"{path}_{u}": PATHS[path](inputs["attn"], u) for path, u in config["cases"]}
