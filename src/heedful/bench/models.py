"""`heedful bench models`: images a second of published models, beside timm's models in the same run."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from heedful.models import named
from heedful.models.backbone import Backbone
from heedful.models.count import multiply_adds, parameters
from heedful.models.named import Named
from heedful.torchvision_shim import mend_torchvision

# What a model is held against that timm does not have: the nearest in multiply-adds.
REFERENCES = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
)
ROUNDS = 5
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Speed:
    """A model of heedful and one of timm. same: timm's version of the same model.

    Images a second of inference and of a training step (forward and backward); the ratios are the medians
    over the rounds of heedful / timm, each round measured back to back.
    """

    model: str
    timm: str
    same: bool
    parameters: int
    multiply_adds: float
    timm_multiply_adds: float
    forward: float
    timm_forward: float
    forward_ratio: float
    training: float
    timm_training: float
    training_ratio: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(names: str | None = None) -> list[str]:
    """The models of a comma-separated list; without one, the smallest of each family of backbones that timm
    has too, or if it has none, the smallest.

    Raises ValueError if a name is unknown, ImportError without timm.
    """
    if names is not None:
        return [_backbone(name).name for name in names.split(",")]
    families: dict[str, list[Named]] = {}
    for told in named.list():
        if issubclass(told.entry.load(), Backbone):
            families.setdefault(told.family, []).append(told)
    chosen = []
    for family in families.values():
        ordered = sorted(family, key=lambda told: told.parameters or 0)
        chosen.append(next((told.name for told in ordered if twin(told.name)), ordered[0].name))
    return sorted(chosen)


def twin(name: str) -> str | None:
    """timm's name of the same model: alike in name, and in parameters within a thousandth.

    (timm's HaloNet has other numbers of heads, hence other tables of positions.)
    """
    timm = _timm()
    told = named.find(name)
    for candidate in (name, f"{name}_tf_{told.size}"):
        if candidate in timm.list_models():
            with torch.device("meta"):
                count = parameters(timm.create_model(candidate))
            if told.parameters is not None and abs(count - told.parameters) <= 1e-3 * told.parameters:
                return candidate
    return None


def nearest(adds: float) -> str:
    """The reference with the nearest number of multiply-adds."""
    return min(REFERENCES, key=lambda name: abs(_timm_multiply_adds(name, 224) - adds))


def speeds(
    names: Sequence[str],
    *,
    batch: int,
    device: str = "cpu",
    rounds: int = ROUNDS,
    on_pair: Callable[[str, str], None] = lambda ours, theirs: None,
) -> Iterator[Speed]:
    """Each model beside timm's, as soon as it is measured.

    The two take turns, so that what else the machine does meets both alike. With one CPU thread the
    processor's time is read, else the clock.
    """
    for name in names:
        told = _backbone(name)
        adds = _multiply_adds(told)
        same = twin(name)
        other = same or nearest(adds)
        on_pair(name, other)
        theirs_size = told.size if same else 224
        pair = []
        for make, size in ((partial(named.create, name), told.size), (partial(_create, other), theirs_size)):
            torch.manual_seed(0)
            model = make().to(device)
            images = torch.randn(batch, 3, size, size, device=device)
            pair.append((model, images))
        forward = _in_turns([_inference(*one) for one in pair], rounds, device)
        training = _in_turns([_training(*one) for one in pair], rounds, device)
        yield Speed(
            model=name,
            timm=other,
            same=same is not None,
            parameters=parameters(pair[0][0]),
            multiply_adds=adds,
            timm_multiply_adds=_timm_multiply_adds(other, theirs_size),
            forward=batch / min(forward[0]),
            timm_forward=batch / min(forward[1]),
            forward_ratio=_ratio(forward),
            training=batch / min(training[0]),
            timm_training=batch / min(training[1]),
            training_ratio=_ratio(training),
        )


def _in_turns(steps: Sequence[Callable[[], object]], rounds: int, device: str) -> list[list[float]]:
    """Seconds of each step in each round, after one round that does not count."""
    one_thread = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 1):
        for step, own in zip(steps, seconds, strict=True):
            start = clock()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:
                own.append(clock() - start)
    return seconds


def _ratio(seconds: list[list[float]]) -> float:
    ours, theirs = seconds
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def _inference(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    return step


def _training(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    return step


def _backbone(name: str) -> Named:
    told = named.find(name)
    if not issubclass(told.entry.load(), Backbone):
        raise ValueError(f"models names {name!r}, a {told.family}, must be image backbones")
    return told


def _multiply_adds(told: Named) -> float:
    """As published, else counted."""
    if told.flops is not None:
        number, unit = re.fullmatch(r"([\d.]+)([KMG])", told.flops).groups()  # type: ignore[union-attr]
        return float(number) * UNITS[unit]
    model = named.create(told.name)
    return multiply_adds(model, torch.zeros(1, 3, told.size, told.size))


@cache
def _timm_multiply_adds(name: str, size: int) -> int:
    with torch.device("meta"):
        return multiply_adds(_create(name), torch.zeros(1, 3, size, size))


def _create(name: str) -> nn.Module:
    model = _timm().create_model(name)
    assert isinstance(model, nn.Module)
    return model


def _timm() -> Any:
    mend_torchvision()
    try:
        import timm
    except ModuleNotFoundError as missing:
        raise ImportError("heedful bench models needs timm: pip install 'heedful[vision]'") from missing
    return timm
