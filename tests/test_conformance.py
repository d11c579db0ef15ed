"""Every registered mixer of heedful is what it declares."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from heedful.ops.attention import attention
from heedful.registry import index
from heedful.testing import BoundCheck, parametrize_mixers
from tests.conftest import SHAPES_CHECKED

# Toy mixers that other tests register do not belong here.
MIXERS = sorted(e.name for e in index().values() if e.is_mixer and e.module.startswith("heedful."))

# These cannot be made with run-time shape checks in place; see conftest.
MARKS = {
    "input_errors": pytest.mark.door,
    "state_errors": pytest.mark.door,
    "constructor_errors": pytest.mark.door,
    "compiling": pytest.mark.compiled,
}


@parametrize_mixers(*MIXERS, marks=MARKS)
def test_mixer(check: BoundCheck) -> None:
    check()


@pytest.mark.skipif(not SHAPES_CHECKED, reason="run without run-time shape checks")
def test_shapes_are_checked_at_run_time() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="value"):
        attention(q, q, q[:, :, :2])
