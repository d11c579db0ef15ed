"""Models and their tokenizers by name: a folder, or an installed package that carries one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from heedful.convert.model import load


def find_model(name: str) -> Path:
    """The folder of a model: `name` itself, or the folder `model` inside the package of that name.

    The package is not imported. Raises ValueError if neither holds a config.json.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    package = name.replace("-", "_")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    for place in (found and found.submodule_search_locations) or ():
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    raise ValueError(
        f"model is {name!r}, must be a folder with a config.json, or an installed package with one in `model`"
    )


def open_model(name: str) -> tuple[PreTrainedModel, Any]:
    """The model in eval mode, and its tokenizer."""
    folder = find_model(name)
    return load(folder).eval(), AutoTokenizer.from_pretrained(folder)
