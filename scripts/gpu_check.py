"""What needs a CUDA GPU: the tests, and heedful's Triton kernels beside FlexAttention and dense attention,
and beside other packages' kernels for linear recurrences (gpu_recurrences).

Started by scripts/gpu_check. Results are written to the JSON file after every point, so that a run that is
stopped loses nothing; a run that names the same file goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_recurrences as recurrences
import torch
import torch.nn.functional as F
import triton
from gpu_measure import difference, pair, time_of, times
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from heedful import patterns as p
from heedful.ops.attention import attention
from heedful.ops.backends import flex
from heedful.ops.backends.triton import configs
from heedful.patterns.radial import Radial
from heedful.routing.block_topk import block_means, block_topk, grid_blocks
from heedful.selection import FULL, BlockTable

ROOT = Path(__file__).parent.parent
BLOCK, PICKED = 128, 16  # of the routed pattern
TOKENS, HEADS = 65536, 8  # tokens of a batch, whatever the length of its sequences
GOAL = 0.8  # of the speed-up over dense attention that the visited share allows
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
MAPS = {8192: (64, 128), 16384: (128, 128), 32768: (128, 256), 65536: (256, 256)}
VIDEOS = {8192: (8, 32, 32), 16384: (16, 32, 32), 32768: (8, 64, 64), 65536: (16, 64, 64)}

Selection = p.Pattern | BlockTable


def routed(query: Tensor, key: Tensor) -> BlockTable:
    """Each block of queries of a head sees the blocks of keys that its mean likes best."""
    n = query.shape[2]
    blocks = grid_blocks((n,), (BLOCK,), device=query.device)
    picked = block_topk(block_means(query, blocks), block_means(key, blocks), min(PICKED, len(blocks)))
    index = picked.sort(dim=-1).values
    count = torch.full(index.shape[:3], index.shape[-1], device=index.device)
    kind = torch.full(index.shape, FULL, dtype=torch.uint8, device=index.device)
    return BlockTable(count, index, kind, (BLOCK, BLOCK), (n, n))


PATTERNS: dict[str, Callable[[int, Tensor, Tensor], Selection]] = {
    "window": lambda n, q, k: p.Window(256),
    "causal-window+sink": lambda n, q, k: p.Causal() & (p.Window(1024) | p.Sink(4)),
    "neighborhood-2d": lambda n, q, k: p.Neighborhood(MAPS[n], (13, 13)),
    "neighborhood-3d": lambda n, q, k: p.Neighborhood(VIDEOS[n], (5, 9, 9)),
    "radial": lambda n, q, k: Radial(VIDEOS[n]),
    "routed": lambda n, q, k: routed(q, k),
}


def main() -> int:
    options = _options()
    found: dict[str, Any] = {"machine": _machine(), "tests": None, "points": [], "recurrences": []}
    if options.json.exists():
        found |= json.loads(options.json.read_text()) | {"machine": _machine()}
    print(", ".join(f"{k} {v}" for k, v in found["machine"].items()), flush=True)
    if options.tests:
        found["tests"] = _tests()
        _write(options.json, found)
    done = {(x["pattern"], x["length"], x["width"]) for x in found["points"] if "error" not in x}
    found["points"] = [x for x in found["points"] if "error" not in x]
    for name in options.patterns if options.bench else []:
        for width in options.widths:
            for length in options.lengths:
                if (name, length, width) not in done:
                    point = _point(name, length, width)
                    found["points"].append(point)
                    print(_line(point), flush=True)
                    _write(options.json, found)
    done = {(x["op"], *x["size"]) for x in found["recurrences"] if "error" not in x}
    found["recurrences"] = [x for x in found["recurrences"] if "error" not in x]
    for op in options.ops if options.bench else []:
        for size in recurrences.SIZES:
            if (op, *size) not in done:
                point = recurrences.point(op, size)
                found["recurrences"].append(point)
                print(recurrences.line(point), flush=True)
                _write(options.json, found)
    print(_table(found["points"]))
    print(recurrences.table(found["recurrences"]))
    failed = found["tests"] is not None and found["tests"]["exit"] != 0
    wrong = any("error" in x or x["difference"] > 0.02 for x in found["points"])
    wrong = wrong or any(map(recurrences.wrong, found["recurrences"]))
    return 1 if failed or wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "gpu_check.json")
    parser.add_argument("--patterns", type=lambda x: [y for y in x.split(",") if y], default=[*PATTERNS])
    parser.add_argument("--ops", type=lambda x: [y for y in x.split(",") if y], default=[*recurrences.OPS])
    parser.add_argument(
        "--lengths", type=lambda x: [int(n) for n in x.split(",")], default=[8192, 32768, 65536]
    )
    parser.add_argument("--widths", type=lambda x: [int(n) for n in x.split(",")], default=[64, 128])
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--no-bench", dest="bench", action="store_false")
    options = parser.parse_args()
    for name, given, known in (
        ("patterns", options.patterns, PATTERNS),
        ("ops", options.ops, recurrences.OPS),
        ("lengths", options.lengths, MAPS),
    ):
        if not set(given) <= set(known):
            parser.error(f"{name} is {given}, must be among {', '.join(map(str, known))}")
    return options


def _machine() -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _tests() -> dict[str, Any]:
    """Run the test files that hold tests for a GPU, whole: on this machine all their kernels are compiled."""
    files = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        *map(str, files),
    ]
    if importlib.util.find_spec("xdist") is not None:
        # Each process compiles kernels of its own; most of the time goes there.
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    print("\n".join(lines[-30:] if result.returncode else lines[-1:]), result.stderr[-2000:], flush=True)
    return {"exit": result.returncode, "summary": lines[-1] if lines else ""}


def _point(name: str, length: int, width: int) -> dict[str, Any]:
    point: dict[str, Any] = {"pattern": name, "length": length, "width": width}
    try:
        return point | _measure(name, length, width)
    except (RuntimeError, ValueError) as error:  # another pattern or length may still serve
        return point | {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _measure(name: str, length: int, width: int) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = (max(1, TOKENS // length), HEADS, length, width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    grad = torch.randn_like(q)
    selection = PATTERNS[name](length, q, k)
    table = selection
    if isinstance(selection, p.Pattern):
        table = selection.block_table(length, block_size=(BLOCK, BLOCK), device=q.device)
    assert isinstance(table, BlockTable)

    def heedful() -> Tensor:
        return attention(q, k, v, pattern=selection, backend="triton")

    def everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= 0) & (k >= 0)

    mask_mod = table.mask_fn or everything
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    mask_mod(zero, zero, zero, zero)  # moves the tables of a pattern to the GPU
    block_mask = flex._block_mask(table, mask_mod, False)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def flexible() -> Tensor:
        return compiled(q, k, v, block_mask=block_mask)

    result: dict[str, Any] = {"visited": table.visited(), "batch": shape[0], "heads": HEADS}
    result["difference"] = difference(heedful, flexible, (q, k, v), grad)
    result["triton"] = times(heedful, (q, k, v), grad)
    result["flex"] = times(flexible, (q, k, v), grad)
    if name == "routed":
        result["routing"] = time_of(lambda: routed(q, k))
        # A table that is new in every step: its lists are made anew.
        result["triton_new"] = times(
            lambda: attention(q, k, v, pattern=routed(q, k), backend="triton"), (q, k, v), grad
        )
    result["dense"] = {}
    for kind, backend in DENSE.items():
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            result["dense"][kind] = times(lambda: F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)
    result["configs"] = {
        f"{key[0]}": [c.rows, c.columns, c.warps, c.stages] for key, c in configs.measured.items()
    }
    configs.measured.clear()
    return result | _ratios(result)


def _ratios(result: dict[str, Any]) -> dict[str, Any]:
    """By pass: times faster than FlexAttention; share of the ideal speed-up over the faster dense kernel."""
    ratios: dict[str, Any] = {
        "over_flex": [f / t for f, t in zip(result["flex"], result["triton"], strict=True)]
    }
    if result["dense"]:
        dense = [min(times) for times in zip(*result["dense"].values(), strict=True)]
        ratios["over_dense"] = [d / t for d, t in zip(dense, result["triton"], strict=True)]
        ratios["reached"] = [x * result["visited"] for x in ratios["over_dense"]]
    return ratios


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1))


HEAD = (
    f"{'pattern':<20}{'tokens':>7}{'D':>5}{'visited':>9}{'triton ms':>17}{'flex ms':>17}{'dense ms':>17}"
    f"{'x flex':>12}{'of ideal':>12}"
)


def _line(x: dict[str, Any]) -> str:
    head = f"{x['pattern']:<20}{x['length']:>7}{x['width']:>5}"
    if "error" in x:
        return f"{head}  {x['error']}"

    dense = [min(times) for times in zip(*x["dense"].values(), strict=True)] if x["dense"] else None
    reached = x.get("reached")
    goal = min(x["over_flex"]) >= 1 and (reached is None or min(reached) >= GOAL)
    return (
        f"{head}{x['visited']:>9.4f}{pair(x['triton'], 3):>17}{pair(x['flex'], 3):>17}{pair(dense, 3):>17}"
        f"{pair(x['over_flex'], 2):>12}{pair(reached, 2):>12}{'' if goal else '  below goal'}"
    )


def _table(points: list[dict[str, Any]]) -> str:
    return "\n".join(["", "forward, forward + backward; bfloat16", HEAD, *map(_line, points)])


if __name__ == "__main__":
    sys.exit(main())
