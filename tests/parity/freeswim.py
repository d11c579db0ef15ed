"""FreeSwim: the authors' masks of inward windows."""

from __future__ import annotations

from typing import Any

from heedful.patterns.inward_window import InwardWindow
from tests.parity.harness import Tensors, adapter


@adapter("freeswim-mask")
def freeswim_mask(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    masks = {}
    for case in config:
        shape = (case["num_frames"], case["height"], case["width"])
        pattern = InwardWindow(shape, (case["d_h"], case["d_w"]))
        masks[case["out"]] = pattern.mask(shape[0] * shape[1] * shape[2])[0, 0]
    return masks
