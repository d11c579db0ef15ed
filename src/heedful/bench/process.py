"""Measuring in processes that have done nothing yet, and the memory a step takes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

MIB = 1 << 20
PATIENCE = 600.0  # seconds a fresh process may take


def peak_memory(step: Callable[[], object], device: str = "cpu") -> float | None:
    """MiB by which the step raises the highest memory use of this process, or of the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    high = _highest_resident()
    step()
    after = _highest_resident()
    return None if high is None or after is None else (after - high) / MIB


def _highest_resident() -> int | None:
    try:
        import resource
    except ImportError:  # not on this system
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of the function in a process that has done nothing yet, or a string: why there is none."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        # Imported once; torch loads the second on first use of checkpointing, which is no cost of a mixer.
        context.set_forkserver_preload([__name__, "torch._dynamo"])
    here, there = context.Pipe(duplex=False)
    job = (there, torch.get_num_threads(), function, arguments)
    process = context.Process(target=_serve, args=job, daemon=True)  # type: ignore[attr-defined]
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE):
            return f"took more than {PATIENCE:.0f} s"
        return here.recv()
    except EOFError:
        process.join()
        return f"the process ended with code {process.exitcode}, perhaps for lack of memory"
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        pipe.send(function(*arguments))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".split("\n")[0])
