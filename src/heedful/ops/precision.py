"""Computing as wide as the code says, also under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def no_autocast(like: Tensor) -> torch.autocast:
    """A context in which operators on the tensor's device keep the dtype of what they are given."""
    kind = like.device.type
    return torch.autocast("cpu" if kind == "meta" else kind, enabled=False)  # autocast knows no meta tensors
