"""Changing a pretrained model's attention for as long as a context lasts.

    with heedful.steer.VisualAttentionRedistribution(keep=0.6)(model):
        model.generate(**inputs)

Interventions stack, leave the model exactly as they found it, also after an exception, and do nothing at
strength 0.
"""

from __future__ import annotations

import importlib
from typing import Any

from heedful.torchvision_shim import mend_torchvision

mend_torchvision()

_LAZY = {
    "AgentSD": "heedful.steer.agentsd",
    "AttentionCalibration": "heedful.steer.act_attention_calibration",
    "GazeShiftGuidance": "heedful.steer.gift",
    "ImageTokenBoost": "heedful.steer.paint",
    "InformedTokenBoost": "heedful.steer.paint",
    "Intervention": "heedful.steer.intervention",
    "VisionHeadReinforcement": "heedful.steer.vhr",
    "VisualAttentionReallocation": "heedful.steer.dara",
    "VisualAttentionRedistribution": "heedful.steer.var_visattnsink",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'heedful.steer' has no attribute {name!r}")
