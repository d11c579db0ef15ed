"""The type checker that tests put on every heedful function: beartype, which cannot resolve `Self` here.

Whole numbers serve as floats, as static checkers have it.
"""

from __future__ import annotations

from typing import Any, Self

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

check = beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({Self: Any}), is_pep484_tower=True))
