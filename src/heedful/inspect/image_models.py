"""Image models by name, timm's and heedful's own, and what becomes of a picture before it enters them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

RANDOM = "random"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, for heedful's own
DIM, DEPTH, PATCH, SIDE = 64, 4, 16, 224  # of the frame around a mixer


@dataclass(frozen=True)
class ImageModel:
    """A model, what it is called, and how a picture enters it: pixels, normalised by mean and deviation."""

    model: nn.Module
    name: str
    pixels: Callable[[Image.Image], Float[Tensor, "1 3 height width"]]
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION


def of_timm(name: str, weights: str | None) -> ImageModel:
    """A model of timm: its pretrained weights from the hub, those of a file, or random ones.

    name: of timm's list, or a folder as timm saves models for the hub. Raises ValueError, saying what to do.
    """
    try:
        from heedful.torchvision_shim import mend_torchvision

        mend_torchvision()
        import timm
        from timm.data import create_transform, resolve_model_data_config
    except ModuleNotFoundError as missing:
        raise ValueError(f"{missing.name} is not installed: pip install 'heedful[vision]'") from missing
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    try:
        if weights == RANDOM:
            torch.manual_seed(0)
        model = timm.create_model(
            source,
            pretrained=weights is None,
            checkpoint_path="" if weights in (None, RANDOM) else str(_file(weights)),
        )
    except (OSError, RuntimeError, ValueError, KeyError) as wrong:
        raise ValueError(
            f"timm cannot make {name}: {first_line(wrong)}; give --weights FILE, or --weights random"
        ) from wrong
    config = resolve_model_data_config(model)
    transform: Any = create_transform(**config, is_training=False)
    return ImageModel(
        model.eval(),
        _called(Path(name).name if Path(name).is_dir() else name, weights),
        lambda picture: transform(picture)[None],
        tuple(config["mean"]),
        tuple(config["std"]),
    )


def of_heedful(name: str, weights: str | None) -> ImageModel:
    """A published model of heedful, or one of its mixers in four blocks; random unless weights are given.

    Raises ValueError for what is no image backbone and no mixer of tokens or maps.
    """
    from heedful.models import named
    from heedful.models.backbone import Backbone

    torch.manual_seed(0)
    if any(name == each.name for each in named.list()):
        told = named.find(name)
        model: nn.Module = named.create(name)
        if not isinstance(model, Backbone) or model.in_channels != 3:
            raise ValueError(f"{name} is a {type(model).__name__}, must be a backbone for colour images")
        called, side = name, told.size
    else:
        model, called, side = MixerFrame(name), f"{name} in {DEPTH} blocks", SIDE
    if weights not in (None, RANDOM):
        _load(model, _file(weights))
    called = _called(called, RANDOM if weights is None else weights)
    return ImageModel(model.eval(), called, lambda picture: _square(picture, side))


class MixerFrame(nn.Module):
    """Patches with their places, then blocks of a mixer and an MLP, each behind a norm; a map comes out."""

    def __init__(self, mixer: str) -> None:
        super().__init__()
        from heedful import registry

        entry = registry.find(mixer)
        asked = [*inspect.signature(entry.load().forward).parameters.values()][2:]
        if entry.kind not in ("sequence", "grid") or any(p.default is p.empty for p in asked):
            raise ValueError(
                f"{mixer} is a {entry.kind}({', '.join(p.name for p in asked)}), must be a published "
                "backbone, or a mixer of tokens or of maps that takes x alone"
            )
        self.on_map = entry.kind == "grid"
        self.embed = nn.Conv2d(3, DIM, PATCH, stride=PATCH)
        self.place = nn.Parameter(torch.randn(1, DIM, SIDE // PATCH, SIDE // PATCH))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * DEPTH))
        self.mixers = nn.ModuleList(registry.create(mixer, DIM) for _ in range(DEPTH))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(DEPTH)
        )

    def forward(self, x: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b c h w"]:
        x = self.embed(x) + self.place
        height = x.shape[2]
        x = x.flatten(2).transpose(1, 2)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            y = self.norms[2 * i](x)
            if self.on_map:
                y = mixer(y.transpose(1, 2).unflatten(2, (height, -1))).flatten(2).transpose(1, 2)
            else:
                y = mixer(y)
            x = x + y
            x = x + mlp(self.norms[2 * i + 1](x))
        return x.transpose(1, 2).unflatten(2, (height, -1))


def _called(name: str, weights: str | None) -> str:
    return f"{name}, random weights" if weights == RANDOM else name


def _square(picture: Image.Image, side: int) -> Float[Tensor, "1 3 side side"]:
    """The middle of a picture at this size, as most backbones for images are tested."""
    scale = side / min(picture.size)
    width, height = (max(side, round(scale * each)) for each in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    cut = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    x = torch.from_numpy(np.asarray(cut, dtype=np.float32) / 255)
    return ((x - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)[None]


def _file(weights: str) -> Path:
    file = Path(weights).expanduser()
    if not file.is_file():
        raise ValueError(f"weights is {weights!r}, must be a file, or {RANDOM!r}")
    return file


def _load(model: nn.Module, file: Path) -> None:
    """Weights with heedful's names or the authors'."""
    from heedful import authors

    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = next((state[key] for key in ("state_dict", "model") if key in state), state)
    if state.keys() == model.state_dict().keys():
        model.load_state_dict(state)
    else:
        authors.load(model, state)


def first_line(wrong: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return next((line for line in str(wrong).splitlines() if line.strip()), type(wrong).__name__).strip()
