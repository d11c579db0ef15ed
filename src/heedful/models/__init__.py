"""Backbones and small complete models made of mixers.

heedful.models.list()                                             # names, parameters, multiply-adds
model = heedful.models.create("biformer_tiny", classes=10)        # (b, 3, height, width) -> (b, 10)
pyramid = heedful.models.create("biformer_tiny", features_only=True)
text = heedful.models.DecoderLM(1000, 64, mixers=3 * ["gated-deltanet"] + ["self-attention"])
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Backbone": "heedful.models.backbone",
    "BlockTransformer": "heedful.models.block_transformer",
    "DecoderLM": "heedful.models.decoder_lm",
    "Encoder": "heedful.models.encoder",
    "FIT": "heedful.models.fit",
    "FITAR": "heedful.models.fit_ar",
    "FITDenoiser": "heedful.models.fit_denoiser",
    "GaussianAdaptiveTransformer": "heedful.models.gaussian_adaptive_transformer",
    "create": "heedful.models.named",
    "find": "heedful.models.named",
    "list": "heedful.models.named",
    "multiply_adds": "heedful.models.count",
    "parameters": "heedful.models.count",
    "replace_attention": "heedful.models.replace",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'heedful.models' has no attribute {name!r}")


def __dir__() -> Any:
    return sorted([*globals(), *__all__])
