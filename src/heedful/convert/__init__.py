"""Checkpoint surgery: attention of pretrained Hugging Face models made into attention of another kind.

    small, report = heedful.convert.to_gqa(model, kv_heads=2, grouping="similarity")
    print(report)                     # what changed; parameters, cache, multiply-adds before and after
    heedful.convert.recover(small, model, batches, steps=200)
    small.save_pretrained("small")    # and heedful.convert.load("small")

Each conversion gives a new model, or with copy=False changes the one that is given, and a `Report`. Models
are those of the Llama kind (llama, mistral, qwen2, qwen3) and of the BERT kind (bert, electra, roberta,
xlm-roberta). What works on weights alone (`dha_fusion`, `mla_init`, `shrp_prune`) loads no transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

from heedful.torchvision_shim import mend_torchvision

mend_torchvision()

_FILES = {
    "Change": "report",
    "Cost": "report",
    "Report": "report",
    "add_p_adapters": "adapters",
    "HeadGroups": "dha",
    "distillation_loss": "distill",
    "frozen_lm_block": "lm_block",
    "fuse_gradually": "dha",
    "grow_mixer": "gda",
    "grow_signal_heads": "gda",
    "head_importance": "importance",
    "heads_by_importance": "prune",
    "layer_importance": "layers",
    "load": "model",
    "prefer": "distill",
    "preference_loss": "distill",
    "prune_experts": "experts",
    "prune_heads": "prune",
    "prune_layers": "layers",
    "prune_paths": "paths",
    "recover": "distill",
    "scale_paths": "paths",
    "search_groups": "dha",
    "to_dha": "dha",
    "to_gqa": "gqa",
    "to_mla": "mla",
    "to_moh": "moh",
    "to_shrp": "experts",
}
__all__ = sorted(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
