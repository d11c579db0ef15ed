"""What the linear recurrences share on the host: which calls the kernels serve, and how they are launched."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heedful.ops.backends.triton.configs import Config, launch_best

ONCE = "form 'kernel' of heedful.ops.{} is differentiable once; form='chunked' is, at any order"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_served(**tensors: Tensor | None) -> None:
    """Raise ValueError if form="kernel" cannot compute with these tensors here."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("form is 'kernel', which needs Triton, and Triton is not installed")
    for name, x in tensors.items():
        if x is None:
            continue
        if not (x.is_cuda or (x.device.type == "cpu" and interpreted())):
            raise ValueError(
                f"{name} is on {x.device.type}, must be on CUDA for form='kernel' "
                "(or on a CPU with TRITON_INTERPRET=1)"
            )
        if x.dtype not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {x.dtype}, must be float16, bfloat16 or float32 for form='kernel'"
            )


def interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def even_rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}


def padded(width: int) -> int:
    """Columns of a tile that holds this many: a power of two, and no fewer than a product of tiles takes."""
    return max(16, 1 << (width - 1).bit_length())


def start(
    kernel: Any,
    choices: list[Config],
    parameters: dict[str, Any],
    programs: Callable[[Config], int],
    *,
    like: Tensor,
    size: int,
) -> None:
    """Launch with the best of the tile sizes. size: multiply-adds of the call, for whether to measure."""
    name = kernel.fn.__name__

    def launch(config: Config) -> None:
        kernel[(programs(config),)](
            **parameters,
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    with torch.cuda.device_of(like):
        if interpreted():
            launch(choices[0])
        else:
            constant = tuple(str(value) for key, value in parameters.items() if key.isupper())
            launch_best(name, (like.dtype, like.device, *constant), choices, size, launch)
