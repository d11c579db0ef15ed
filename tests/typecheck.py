"""The type checker that tests put on every heedful function: beartype, which cannot resolve `Self` here."""

from __future__ import annotations

from typing import Any, Self

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

check = beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({Self: Any})))
