"""Classification of real images: scikit-learn's handwritten digits, or a folder of photographs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from heedful.bench.tasks.task import ACCURACY, Measure

DIGITS = "scikit-learn's digits"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True, eq=False)
class Images:
    """pixels (images, channels, side, side) in 0..1 and their labels; a fixed third is held out.

    The network sees a grid of side / patch x side / patch.
    """

    name: ClassVar[str] = "images"
    unit: ClassVar[str] = "images"
    measure: ClassVar[Measure] = ACCURACY

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]
    source: str
    patch: int = 1
    batch_size: int = 32

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def side(self) -> int:
        """Side of the grid that the network sees."""
        return self.pixels.shape[2] // self.patch

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def units(self) -> int:
        return self.batch_size

    @property
    def tokens(self) -> int:
        return self.batch_size * self.side**2

    @property
    def most_frequent(self) -> float:
        """Accuracy of always naming the most frequent class."""
        return int(torch.bincount(self.labels).max()) / len(self.labels)

    @property
    def goal(self) -> float:
        return 0.93 if self.source == DIGITS else self.most_frequent + (1 - self.most_frequent) / 4

    @property
    def about(self) -> str:
        size = self.pixels.shape[2]
        return (
            f"{self.source}, {len(self.labels)} images of {size} x {size}, {self.classes} classes; "
            f"always the most frequent gives {self.most_frequent:.3f}. "
            "Channel and pool mixers sit among 3 x 3 depthwise convolutions, which count here too"
        )

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Indices of training and held-out images; of each class a third is held out, always the same."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))
        train, held = [], []
        for label in range(self.classes):
            own = order[self.labels[order] == label]
            cut = max(1, len(own) // 3)
            held.append(own[:cut])
            train.append(own[cut:])
        return torch.cat(train), torch.cat(held)

    @cached_property
    def normal(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the training images."""
        train = self.pixels[self.split[0]]
        std, mean = torch.std_mean(train, dim=(0, 2, 3), keepdim=True)
        return mean[0], std[0].clamp(min=1e-3)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        train = self.split[0]
        chosen = train[torch.randint(len(train), (self.batch_size,), generator=generator)]
        return self._normalised(chosen), self.labels[chosen]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in self.split[1].split(256):
            yield self._normalised(chosen), self.labels[chosen]

    def _normalised(self, chosen: Tensor) -> Tensor:
        mean, std = self.normal
        return (self.pixels[chosen] - mean) / std


def digits() -> Images:
    """The 1797 handwritten digits of scikit-learn, 8 x 8, one grid cell a pixel."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the digits of the task images come with scikit-learn, which is not installed: "
            "pip install 'heedful[data]', or give a folder of photographs with --data"
        ) from None
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return Images(pixels, torch.tensor(data.target), tuple("0123456789"), DIGITS)


def folder(path: Path, side: int = 64) -> Images:
    """Photographs in one folder a class, scaled so that the shorter side is `side` and cut to a square."""
    from PIL import Image

    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; the task images needs a folder with one folder a class")
    files = {
        part.name: found
        for part in sorted(path.iterdir())
        if part.is_dir() and (found := sorted(f for f in part.rglob("*") if f.suffix.lower() in SUFFIXES))
    }
    if not files:
        raise ValueError(f"{path} holds no images; it must hold one folder a class with images in it")
    if len(files) < 2:
        raise ValueError(f"{path} holds the one class {next(iter(files))!r}; there must be at least two")
    pixels, labels = [], []
    for label, (name, found) in enumerate(files.items()):
        if len(found) < 3:
            raise ValueError(f"class {name!r} has {len(found)} images, must have at least 3")
        for file in found:
            try:
                with Image.open(file) as image:
                    pixels.append(_square(image.convert("RGB"), side))
            except OSError as error:
                raise ValueError(f"{file} cannot be read as an image: {error}") from None
            labels.append(label)
    source = f"the photographs in {path.name}"
    return Images(torch.stack(pixels), torch.tensor(labels), tuple(files), source, patch=side // 16)


def _square(image, side: int) -> Tensor:  # type: ignore[no-untyped-def]
    from PIL import ImageOps

    array = np.asarray(ImageOps.fit(image, (side, side)), dtype=np.float32) / 255
    return torch.from_numpy(array.copy()).permute(2, 0, 1)
