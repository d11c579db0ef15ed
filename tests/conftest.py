"""Set up before heedful is imported: run-time shape checks, threads, hypothesis.

While tests run, every heedful function checks the shapes it is annotated with (jaxtyping with beartype),
unless HEEDFUL_TYPECHECK=0. Two kinds of test cannot be made with those checks in place and are left to a
second run: `door` tests, about the errors that heedful raises by itself, and `compiled` tests, because
torch.compile cannot trace the checks.

    pytest
    HEEDFUL_TYPECHECK=0 pytest -m "door or compiled"
"""

from __future__ import annotations

import os
import sys
import types

import hypothesis
import jaxtyping
import pytest
import torch

import tests.typecheck  # noqa: F401  the import hook looks it up as an attribute

SHAPES_CHECKED = os.environ.get("HEEDFUL_TYPECHECK", "1") != "0"
UNCHECKED = ("door", "compiled")

if SHAPES_CHECKED:
    jaxtyping.install_import_hook("heedful", "tests.typecheck.check")

if not torch.cuda.is_available():
    # Triton decides when it is first imported whether its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The binary of torchvision may not fit a CPU build of torch; timm needs none of what it would register.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

torch.set_num_threads(1)  # tests are small, and pytest-xdist has one worker a core

hypothesis.settings.register_profile("heedful", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("heedful")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "compiled: torch.compile traces heedful; run without run-time shape checks"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not SHAPES_CHECKED:
        return
    kept: list[pytest.Item] = []
    later: list[pytest.Item] = []
    for item in items:
        (later if any(item.get_closest_marker(mark) for mark in UNCHECKED) else kept).append(item)
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = kept
