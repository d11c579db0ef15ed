"""Tile sizes of the kernels: a few candidates a kernel, the best of which is measured once on large calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

_WORTH = 1 << 28  # pairs of a call from which on measuring pays


@dataclass(frozen=True)
class Config:
    """Queries and keys of a kernel tile, warps of a program, depth of the software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


# The first candidate serves where nothing is measured. By kernel, half precision or not, and the wider of
# the padded head widths up to which they hold.
_CANDIDATES: dict[tuple[str, bool], dict[int, list[Config]]] = {
    ("attend", True): {
        64: [Config(128, 64, 4, 3), Config(128, 128, 8, 3), Config(128, 128, 4, 3), Config(64, 64, 4, 2)],
        128: [Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 32, 4, 2)],
        256: [Config(128, 64, 8, 2), Config(128, 32, 8, 3), Config(64, 32, 4, 1)],
    },
    ("attend", False): {
        64: [Config(64, 32, 4, 2), Config(128, 32, 8, 2), Config(64, 64, 4, 2)],
        128: [Config(64, 32, 4, 2), Config(64, 32, 8, 2), Config(32, 32, 4, 2)],
        256: [Config(32, 16, 4, 2), Config(16, 16, 4, 1)],
    },
    ("query_gradient", True): {
        64: [Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(128, 128, 8, 2)],
        128: [Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 128, 8, 2)],
        256: [Config(64, 64, 8, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)],
    },
    ("query_gradient", False): {
        64: [Config(64, 32, 4, 2), Config(32, 32, 4, 2)],
        128: [Config(32, 32, 4, 2), Config(64, 32, 8, 1)],
        256: [Config(16, 16, 4, 2), Config(16, 16, 4, 1)],
    },
    ("key_gradient", True): {
        64: [Config(64, 128, 8, 3), Config(64, 64, 4, 3), Config(128, 128, 8, 2)],
        128: [Config(64, 128, 8, 2), Config(32, 64, 4, 2), Config(64, 64, 4, 2)],
        256: [Config(32, 64, 8, 2), Config(32, 32, 4, 1)],
    },
    ("key_gradient", False): {
        64: [Config(32, 64, 4, 2), Config(32, 32, 4, 2)],
        128: [Config(16, 32, 4, 2), Config(32, 32, 4, 1)],
        256: [Config(16, 16, 4, 1)],
    },
}
measured: dict[tuple[Any, ...], Config] = {}


def candidates(kernel: str, dtype: torch.dtype, width: int, block_size: tuple[int, int]) -> list[Config]:
    """What a kernel may take for head widths padded to `width`, cut to blocks of this size."""
    rows, columns = (max(16, 1 << (size - 1).bit_length()) for size in block_size)
    by_width = _CANDIDATES[kernel, dtype.itemsize == 2]
    found = by_width[min(w for w in by_width if w >= width)]
    cut = [replace(c, rows=min(c.rows, rows), columns=min(c.columns, columns)) for c in found]
    return list(dict.fromkeys(cut))


def launch_best(
    kernel: str,
    key: tuple[Any, ...],
    choices: list[Config],
    pairs: int,
    launch: Callable[[Config], object],
) -> None:
    """Launch with the choice that is fastest for calls of this key, measured where the call is large enough.

    Where nothing is measured, the first that fits the shared memory of the GPU.
    """
    full_key = (kernel, *key)
    large = len(choices) > 1 and pairs >= _WORTH and not torch.cuda.is_current_stream_capturing()
    if large and full_key not in measured:
        measured[full_key] = min(choices, key=lambda config: _time(launch, config))
    if full_key in measured:
        launch(measured[full_key])
        return
    for config in choices[:-1]:
        try:
            launch(config)
            return
        except OutOfResources:
            continue
    launch(choices[-1])


def _time(launch: Callable[[Config], object], config: Config) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(config), warmup=5, rep=30, return_mode="median")
    except OutOfResources:
        return math.inf
