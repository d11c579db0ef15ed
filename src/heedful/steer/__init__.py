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
    "AssemblyDecoding": "heedful.steer.agla",
    "AttentionCalibration": "heedful.steer.act_attention_calibration",
    "ContrastiveLogits": "heedful.steer.contrastive",
    "CurvedPerturbedHeads": "heedful.steer.headhunter_softpag",
    "GazeShiftGuidance": "heedful.steer.gift",
    "ImageFreeContrast": "heedful.steer.contrastive",
    "ImageTokenBoost": "heedful.steer.paint",
    "InformedTokenBoost": "heedful.steer.paint",
    "Intervention": "heedful.steer.intervention",
    "LocalCoherenceBoost": "heedful.steer.lvlms_saliency",
    "OutlierTokenContrast": "heedful.steer.damro",
    "PerturbedAttentionGuidance": "heedful.steer.headhunter_softpag",
    "PerturbedHeads": "heedful.steer.headhunter_softpag",
    "SaliencyGuidedRejection": "heedful.steer.lvlms_saliency",
    "VisionHeadReinforcement": "heedful.steer.vhr",
    "VisualAttentionReallocation": "heedful.steer.dara",
    "VisualAttentionRedistribution": "heedful.steer.var_visattnsink",
    "answer_attention": "heedful.steer.carve",
    "contrastive_attention_crop": "heedful.steer.carve",
    "head_hunter": "heedful.steer.headhunter_softpag",
    "token_grid": "heedful.steer.carve",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'heedful.steer' has no attribute {name!r}")
