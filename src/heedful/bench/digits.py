"""`heedful bench digits`: does every family of image backbones learn?

A tiny instance of each family is trained on two thirds of scikit-learn's 1797 handwritten digits, drawn at
32 x 32 pixels, and tested on the same held-out third; a linear classifier names 96 % of those rightly.
"""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from heedful.bench.tasks.images import Images, digits
from heedful.bench.train import OnStep, train
from heedful.models.backbone import Backbone
from heedful.models.count import parameters
from heedful.registry import index

SIDE = 32
BATCH = 64
LEARNING_RATE = 3e-3
EPOCHS = 20
EPOCHS_PLAIN = 60  # of transformers without convolutions, which have to learn what neighbours are
GOAL = 0.97

# A family that is not named here is trained as its `example`.
DIMS = (24, 32, 48, 64)
PLAIN = {"dim": 48, "patch": 8}
PYRAMID = {"dims": DIMS, "heads": (1, 2, 3, 4)}
TINY: dict[str, dict[str, Any]] = {
    "a2mamba-backbone": {"dims": DIMS, "heads": (2, 2, 2, 4), "projection": 96},
    "agent-cswin-backbone": {**PYRAMID, "heads": (2, 2, 4, 4)},
    "agent-deit-backbone": PLAIN,
    "agent-pvt-backbone": PYRAMID,
    "agent-swin-backbone": PYRAMID,
    "biformer-backbone": {"dims": DIMS, "head_dim": 8},
    "davit-backbone": PYRAMID,
    "dhvt-backbone": {**PLAIN, "heads": 4},
    "dualtoken-vit-backbone": {"dims": (32, 48, 64), "heads": (2, 3, 4)},
    "efficientvit-cga-backbone": {"dims": (32, 48, 64), "heads": (2, 3, 4), "key_dim": 8},
    "evit-backbone": PLAIN,
    "focalnet-backbone": {"dims": DIMS},
    "gcvit-backbone": {"dim": 16, "heads": (1, 2, 4, 8)},
    "halonet-backbone": {"dims": DIMS, "final": 96},
    "inline-cswin-backbone": {**PYRAMID, "heads": (2, 2, 4, 4)},
    "inline-deit-backbone": {**PLAIN, "depth": 3},
    "inline-pvt-backbone": PYRAMID,
    "inline-swin-backbone": PYRAMID,
    "l2vit-backbone": PYRAMID,
    "mala-backbone": {**PYRAMID, "projection": 96},
    "mambaout-backbone": {"dims": DIMS},
    "maxvit-backbone": {"dims": DIMS, "stem": 16, "head_dim": 8},
    "metaformer-poolformer-backbone": {"dims": DIMS},
    "moh-transnext-backbone": {"dims": DIMS, "trained_size": SIDE},
    "msvmamba-backbone": {"dims": DIMS},
    "patnet-backbone": {"dim": 16, "feature_dim": 96},
    "rala-backbone": {**PYRAMID, "projection": 96},
    "shvit-backbone": {"dims": (32, 48, 64), "partial_dims": (0, 12, 16), "qk_dim": 8},
    "sparsifiner-backbone": {**PLAIN, "heads": 4},
    "spectformer-backbone": PLAIN,
    "spectformer-hierarchical-backbone": {**PYRAMID, "stem": 16},
    "tap-fan-backbone": {"dim": 48, "heads": 4},
    "transnext-backbone": {**PYRAMID, "trained_size": SIDE},
    "van-lka-backbone": {"dims": DIMS},
    "vit-lm-block-backbone": {**PLAIN, "heads": 4, "lm_dim": 64, "lm_hidden": 96},
}


@dataclass(frozen=True)
class Learned:
    """accuracy on the held-out third; seconds of processor time for training and testing."""

    family: str
    parameters: int
    epochs: int
    accuracy: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def families(names: str | None = None) -> list[str]:
    """Every registered image backbone, or those of a comma-separated list; "-backbone" may be left out.

    Raises ValueError if one is unknown.
    """
    known = []
    for name, entry in sorted(index().items()):
        if entry.kind == "model" and isinstance(made := entry.load(), type) and issubclass(made, Backbone):
            known.append(name)
    if names is None:
        return known
    chosen = []
    for given in names.split(","):
        name = given if given in known else f"{given}-backbone"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known
            raise ValueError(f"families names {given!r}, must be of {', '.join(near)}")
        chosen.append(name)
    return chosen


def tiny(family: str) -> Backbone:
    """The instance of the family that is trained: one channel in, ten classes out."""
    made = index()[family].load()
    arguments = {**made.example, **TINY.get(family, {}), "classes": 10, "in_channels": 1}
    if "image_size" in inspect.signature(made).parameters:
        arguments["image_size"] = SIDE
    model = made(**arguments)
    assert isinstance(model, Backbone)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # MaxViT's 0.01 as published is for trainings of very many steps; here its statistics would lag
            # behind.
            module.momentum = 0.1
    return model


def task() -> Images:
    """The digits at 32 x 32; ValueError without scikit-learn."""
    small = digits()
    drawn = F.interpolate(small.pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return replace(small, pixels=drawn, batch_size=BATCH)


def usual_epochs(family: str) -> int:
    """How many epochs the family is trained where nothing else is asked."""
    return EPOCHS_PLAIN if "patch" in TINY.get(family, {}) else EPOCHS


def steps(images: Images, epochs: int) -> int:
    """How many batches the epochs take."""
    return max(1, round(epochs * len(images.split[0]) / images.batch_size))


def learn(family: str, images: Images, *, epochs: int, seed: int, on_step: OnStep) -> Learned:
    """Train the family's tiny instance and test it."""
    torch.manual_seed(seed)
    model = tiny(family)
    start = time.process_time()
    trained = train(
        model,
        images,
        steps=steps(images, epochs),
        learning_rate=LEARNING_RATE,
        seed=seed,
        device=torch.device("cpu"),
        on_step=on_step,
    )
    return Learned(family, parameters(model), epochs, trained.quality, time.process_time() - start)


def results(
    names: Sequence[str],
    *,
    epochs: int | None = None,
    seed: int = 0,
    on_step: OnStep = lambda step, loss: None,
) -> Iterator[Learned]:
    """Each family's figures, as soon as they are there."""
    images = task()
    for name in names:
        yield learn(name, images, epochs=epochs or usual_epochs(name), seed=seed, on_step=on_step)
