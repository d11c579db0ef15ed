"""Names of models: what is listed, found and created."""

from __future__ import annotations

import pytest

from heedful import models
from heedful.registry import configurations


def test_configurations_are_read_from_literals():
    text = 'X = 1\nCONFIGS: dict = {"a_tiny": {"parameters": 12, "arguments": {"depths": (1, 2)}}}\n'
    assert configurations(text) == {"a_tiny": {"parameters": 12, "arguments": {"depths": (1, 2)}}}
    assert configurations("X = 1\n") == {}


def test_unknown_names():
    with pytest.raises(ValueError, match="no model is called 'no_such_model_at_all'"):
        models.create("no_such_model_at_all")
