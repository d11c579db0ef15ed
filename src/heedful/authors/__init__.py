"""Loading what the authors of a mechanism released: their state dictionaries, with their names."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from heedful.authors.table import Table

__all__ = ["Table", "load", "table_of"]

M = TypeVar("M", bound=nn.Module)


def load(model: M, state_dict: Mapping[str, Any], *, prefix_strip: Sequence[str] = ("module.",)) -> M:
    """Copy the authors' released parameters into a heedful mixer or model, and give the model back.

    `state_dict` has the authors' names and layouts; prefixes in `prefix_strip` (what wrappers such as
    DataParallel put before every name) are removed where all names have them. Loading is strict: every
    entry is used, every parameter and buffer filled, every shape right; else a ValueError lists what does
    not fit, and the model is left as it was. Also raises ValueError if no table of names is known for the
    model's class, or if `state_dict` holds something that is no tensor (a checkpoint around it).
    """
    if odd := [name for name, value in state_dict.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"state_dict holds {', '.join(odd[:5])}, which are no tensors; pass the part with weights"
        )
    given = dict(state_dict)
    for prefix in prefix_strip:
        if given and all(name.startswith(prefix) for name in given):
            given = {name.removeprefix(prefix): value for name, value in given.items()}
    ours = table_of(type(model)).apply(given)
    if complaints := _misfits(ours, model.state_dict()):
        raise ValueError(f"state_dict does not fit {type(model).__name__}: " + "; ".join(complaints))
    model.load_state_dict(ours, strict=True)
    return model


def table_of(kind: type[nn.Module]) -> Table:
    """The table of a class of heedful, or of the nearest class it is derived from.

    The tables of the classes in mixers/.../biformer.py are TABLES in authors/biformer.py.
    """
    for cls in kind.__mro__:
        name = f"heedful.authors.{cls.__module__.rsplit('.', 1)[-1]}"
        if not cls.__module__.startswith("heedful.") or importlib.util.find_spec(name) is None:
            continue
        found = getattr(importlib.import_module(name), "TABLES", {}).get(cls.__name__)
        if found is not None:
            return found
    raise ValueError(f"no table of the authors' names is known for {kind.__name__}")


def _misfits(ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    complaints = []
    if unused := sorted(ours.keys() - wanted.keys()):
        complaints.append(f"not used: {', '.join(unused)}")
    if missing := sorted(wanted.keys() - ours.keys()):
        complaints.append(f"missing: {', '.join(missing)}")
    complaints += [
        f"{name} has shape {tuple(ours[name].shape)}, must be {tuple(wanted[name].shape)}"
        for name in sorted(ours.keys() & wanted.keys())
        if ours[name].shape != wanted[name].shape
    ]
    return complaints
