"""Equality with the authors' code: reading golden files, running adapters, measuring errors.

A golden file FILE.json says how an authors' module was built and called, and the shape and dtype of
every parameter, input and output; FILE.npz, where given, holds the arrays ("param.q.weight", "in.x",
"out.y"). An adapter repeats the call with heedful alone:

    @adapter("eca")
    def eca(config, params, inputs):
        ...
        return {"y": y}

It gets the file's `config` and dictionaries of tensors whose names lack the prefix, and gives a
dictionary of outputs named in the same way.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import pkgutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-4

Tensors = dict[str, Tensor]
Run = Callable[[Any, Tensors, Tensors], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Adapter:
    """How heedful repeats the call of one golden file; call it as `adapter(config, params, inputs)`.

    ignore  output name (or fnmatch pattern) -> why its values are arbitrary; these are not compared
    inputs  (config, drawn inputs) -> inputs, for files without arrays whose inputs cannot be random
    """

    file: str
    run: Run
    ignore: dict[str, str] = field(default_factory=dict)
    inputs: Callable[[Any, Tensors], Tensors] | None = None

    def __call__(self, config: Any, params: Tensors, inputs: Tensors) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return self.run(config, params, inputs)

    def ignored(self, output: str) -> bool:
        return any(fnmatch.fnmatchcase(output, pattern) for pattern in self.ignore)


@dataclass(frozen=True)
class Result:
    """What came of one golden file. status: pass, fail, unchecked (no arrays) or missing (no adapter)."""

    file: str
    card: str
    status: str
    error: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_adapters: dict[str, Adapter] = {}


def adapter(
    *files: str,
    ignore: Mapping[str, str] | None = None,
    inputs: Callable[[Any, Tensors], Tensors] | None = None,
) -> Callable[[Run], Run]:
    """Decorator: the function repeats the calls of these golden files (names without ".json").

    The function is given back unchanged, so that one function can be declared several times.
    """

    def decorate(run: Run) -> Run:
        for file in files:
            if file in _adapters and _adapters[file].run is not run:
                raise ValueError(f"golden file {file!r} has two adapters")
            _adapters[file] = Adapter(file, run, dict(ignore or {}), inputs)
        return run

    return decorate


@functools.cache
def _discover() -> None:
    package = importlib.import_module("tests.parity")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in ("harness", "__main__"):
            importlib.import_module(f"tests.parity.{module.name}")


def adapters() -> dict[str, Adapter]:
    """All adapters of tests/parity/*.py by the name of their golden file."""
    _discover()
    return dict(sorted(_adapters.items()))


@dataclass(frozen=True)
class Golden:
    """One golden file; `arrays` is None where only the shapes are given."""

    file: str
    card: str
    config: Any
    stated: dict[str, tuple[tuple[int, ...], torch.dtype]]
    arrays: Tensors | None

    @classmethod
    def read(cls, path: Path) -> Golden:
        told = json.loads(path.read_text(encoding="utf-8"))
        stated = {
            name: (tuple(spec["shape"]), getattr(torch, spec["dtype"]))
            for name, spec in told["arrays"].items()
        }
        arrays = None
        if path.with_suffix(".npz").exists():
            with np.load(path.with_suffix(".npz")) as stored:
                arrays = {name: torch.from_numpy(stored[name].copy()) for name in stored.files}
        return cls(path.stem, told["card"], told["config"], stated, arrays)

    def part(self, prefix: str, arrays: Tensors) -> Tensors:
        """The arrays of "param", "in" or "out", named without the prefix."""
        return {name[len(prefix) + 1 :]: a for name, a in arrays.items() if name.startswith(prefix + ".")}

    def draw(self) -> Tensors:
        """Seeded parameters and inputs of the stated shapes and dtypes."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.file.encode()))
        drawn = {}
        for name, (shape, dtype) in self.stated.items():
            if name.startswith("out."):
                continue
            if dtype.is_floating_point:
                values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
                if name.endswith("running_var"):
                    values = values.abs() + 0.5  # a variance
                drawn[name] = values.to(dtype)
            else:
                drawn[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
        return drawn


def with_counters(params: Tensors) -> Tensors:
    """The parameters, with the counters of batch norms, which some files leave out as nothing learned."""
    norms = [name.removesuffix("running_var") for name in params if name.endswith("running_var")]
    return {**params, **{f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}}


def array_error(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b| over the finite entries (max|a - b| where the reference is zero).

    inf if shapes, dtypes or the places of non-finite entries differ, or if whole numbers do.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    finite = theirs.isfinite()
    odd = torch.where(finite, 0.0, theirs)
    if not torch.equal(finite, ours.isfinite()) or not torch.equal(
        odd.nan_to_num(nan=1.0, posinf=2.0, neginf=3.0),
        torch.where(finite, 0.0, ours).nan_to_num(nan=1.0, posinf=2.0, neginf=3.0),
    ):
        return float("inf")
    a, b = ours[finite].double(), theirs[finite].double()
    if not b.numel():
        return 0.0
    scale = float(b.abs().max())
    return float((a - b).abs().max()) / (scale or 1.0)


def run_file(path: Path) -> Result:
    """Run the adapter of one golden file and compare what it gives with what is stated."""
    golden = Golden.read(path)
    found = adapters().get(golden.file)
    if found is None:
        return Result(golden.file, golden.card, "missing", reason="no adapter")

    arrays = golden.arrays if golden.arrays is not None else golden.draw()
    params, inputs = golden.part("param", arrays), golden.part("in", arrays)
    try:
        if golden.arrays is None and found.inputs is not None:
            inputs = found.inputs(golden.config, inputs)
        outputs = found(golden.config, params, inputs)
    except Exception as wrong:
        return Result(golden.file, golden.card, "fail", reason=f"{type(wrong).__name__}: {wrong}")

    complaints, worst = [], 0.0
    for name, (shape, dtype) in golden.stated.items():
        if not name.startswith("out.") or found.ignored(output := name[4:]):
            continue
        if output not in outputs:
            complaints.append(f"{output} is not among the outputs {sorted(outputs)}")
            continue
        ours = outputs[output].detach().cpu()
        if ours.shape != shape or ours.dtype != dtype:
            complaints.append(f"{output} is {tuple(ours.shape)} {ours.dtype}, must be {shape} {dtype}")
        elif golden.arrays is not None:
            error = array_error(ours, golden.arrays[name])
            worst = max(worst, error)
            if not error <= TOLERANCE:
                complaints.append(f"{output} differs, error {error:.3g}")
    if complaints:
        error = None if golden.arrays is None else worst
        return Result(golden.file, golden.card, "fail", error, "; ".join(complaints))
    reason = "; ".join(f"{name} is not compared: {why}" for name, why in found.ignore.items())
    if golden.arrays is None:
        return Result(golden.file, golden.card, "unchecked", reason=reason)
    return Result(golden.file, golden.card, "pass", worst, reason)


def golden_files(folder: Path) -> list[Path]:
    """The golden files of a folder, sorted; a ValueError if there is none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"no golden file (*.json) in {folder}")
    return files
