"""Radial attention: the authors' block masks, read off the pattern at the first token of each block."""

from __future__ import annotations

from typing import Any

import torch

from heedful.patterns.radial import Radial
from tests.parity.harness import Tensors, adapter


@adapter("radial-mask")
def radial_mask(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    masks = {}
    for case in config:
        video, frames, size = case["video_token_num"], case["num_frame"], case["block_size"]
        pattern = Radial(
            (frames, video // frames),
            case["decay_factor"],
            size,
            sink_frame=case["model_type"] == "wan",
            text=case["s"] - video,
        )
        first = torch.arange(case["s"] // size) * size
        zero = torch.tensor(0)
        masks[case["out"]] = pattern.visible(zero, zero, first[:, None], first)
    return masks
