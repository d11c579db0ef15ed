"""Importing transformers and timm where torchvision's operators do not fit the torch at hand."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types


@functools.cache
def mend_torchvision() -> None:
    """If torchvision is installed but fails to import for want of its operators, let it be imported without
    them.

    That is so where torch is a CPU build and torchvision one for CUDA: its first import registers meta
    kernels of operators that are not there, and with it transformers and timm fail, which need none of them.
    A torchvision that imports is left alone.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as wrong:
        if "torchvision::" not in str(wrong):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
