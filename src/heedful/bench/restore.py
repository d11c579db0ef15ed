"""Super-resolution and restoration models, trained on parts of two photographs and tested on the rest.

The photographs come with scikit-learn. The middle third of each is held out, what is left and right of it is
for training. `catanet` doubles the size of images made half as large, and has to beat bicubic interpolation;
the region attention transformer takes noise away, and has to beat the noisy image. Scores are PSNR in
decibels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from heedful.checks import check_choice, check_positive
from heedful.models.catanet import CATANet
from heedful.models.count import parameters
from heedful.models.region_attention_transformer import RegionAttentionTransformer, focal_region_loss

SCALE, NOISE, LEVELS = 2, 25 / 255, 6
BATCH, SIDE, RATE = 8, 64, 2e-3  # side of a training patch of the original
CROP, ZOOM = 112, 2  # of the pictures

OnStep = Callable[[int, float], None]  # steps done, loss


@dataclass(frozen=True)
class Scores:
    """PSNR of the held-out part of one photograph; picture: before, after and original, side by side."""

    photograph: str
    before: float
    after: float
    picture: Image.Image = field(repr=False, compare=False)


@dataclass(frozen=True)
class Restored:
    """What a small model learned."""

    model: str
    task: str
    before: str
    parameters: int
    steps: int
    seconds: float
    scores: list[Scores]

    def as_dict(self) -> dict[str, Any]:
        scores = [{k: v for k, v in vars(score).items() if k != "picture"} for score in self.scores]
        return {**vars(self), "scores": scores}


class SuperResolution:
    """Twice the size; the small image is the original averaged bicubically."""

    task, before = "twice the size", "bicubic"

    def build(self) -> nn.Module:
        return CATANet(
            scale=SCALE,
            dim=24,
            qk_dim=24,
            mlp_dim=48,
            centres=(16, 32),
            group_sizes=(128, 64),
            patch_sizes=(16, 20),
        )

    def damaged(self, photograph: Tensor, generator: torch.Generator) -> Tensor:
        small = F.interpolate(photograph, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
        return small.clamp(0, 1)

    def restored(self, model: nn.Module, damaged: Tensor) -> Tensor:
        return model(damaged)

    def loss(self, model: nn.Module, damaged: Tensor, original: Tensor) -> Tensor:
        return (model(damaged) - original).abs().mean()

    def baseline(self, damaged: Tensor) -> Tensor:
        return F.interpolate(damaged, scale_factor=SCALE, mode="bicubic").clamp(0, 1)


class Denoising:
    """Gaussian noise of deviation 25 of 255; regions are levels of brightness of the blurred noisy image."""

    task, before = "noise of 25/255", "noisy"

    def build(self) -> nn.Module:
        return RegionAttentionTransformer(
            in_channels=3, dim=16, middle=3, encoders=(1, 1), decoders=(1, 1), heads=4
        )

    def damaged(self, photograph: Tensor, generator: torch.Generator) -> Tensor:
        return photograph + NOISE * torch.randn(photograph.shape, generator=generator)

    def restored(self, model: nn.Module, damaged: Tensor) -> Tensor:
        return model(damaged, brightness_regions(damaged))

    def loss(self, model: nn.Module, damaged: Tensor, original: Tensor) -> Tensor:
        regions = brightness_regions(damaged)
        return focal_region_loss(model(damaged, regions), original, regions)

    def baseline(self, damaged: Tensor) -> Tensor:
        return damaged.clamp(0, 1)


TASKS: dict[str, type[SuperResolution] | type[Denoising]] = {
    "catanet": SuperResolution,
    "region-attention-transformer": Denoising,
}


def brightness_regions(
    image: Float[Tensor, "b c height width"], *, levels: int = LEVELS
) -> Int[Tensor, "b height width"]:
    """Pixels of like brightness, in the mean over 9 x 9 pixels: equally many in each level."""
    blurred = F.avg_pool2d(image.mean(1, keepdim=True), 9, stride=1, padding=4, count_include_pad=False)
    rank = blurred.flatten(1).argsort(1).argsort(1)
    return (rank * levels // rank.shape[1]).unflatten(1, image.shape[2:])


def psnr(image: Float[Tensor, "..."], original: Float[Tensor, "..."]) -> float:
    """-10 log10 of the mean square error, the image cut to [0, 1]."""
    return float(-10 * (image.clamp(0, 1) - original).square().mean().log10())


def photographs() -> dict[str, Float[Tensor, "1 3 height width"]]:
    """The two photographs of scikit-learn, by name, in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise ValueError(
            "the photographs come with scikit-learn, which is not installed: pip install 'heedful[data]'"
        ) from None
    found = load_sample_images()
    return {
        name.rsplit("/", 1)[-1].removesuffix(".jpg"): torch.from_numpy(image / 255)
        .float()
        .movedim(-1, 0)[None]
        for name, image in zip(found.filenames, found.images, strict=True)
    }


def restore(name: str, *, steps: int = 500, seed: int = 0, on_step: OnStep | None = None) -> Restored:
    """Train a small model on both sides of the photographs, and score it on their middle.

    name   "catanet" or "region-attention-transformer"
    steps  of training, on 8 patches of 64 x 64 pixels each

    ValueError on another name, or without scikit-learn.
    """
    check_choice("name", name, [*TASKS])
    check_positive("steps", steps)
    job = TASKS[name]()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    strips = {title: _strips(photograph) for title, photograph in photographs().items()}
    training = [strip for left, _, right in strips.values() for strip in (left, right)]
    model = job.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    begin = time.perf_counter()
    for step in range(steps):
        original = _patches(training, generator)
        loss = job.loss(model, job.damaged(original, generator), original)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    seconds = time.perf_counter() - begin
    model.eval()
    scores = []
    for title, (_, original, _) in strips.items():
        damaged = job.damaged(original, torch.Generator().manual_seed(seed + 1))
        with torch.no_grad():
            before, after = job.baseline(damaged), job.restored(model, damaged).clamp(0, 1)
        picture = _side_by_side([before, after, original])
        scores.append(Scores(title, psnr(before, original), psnr(after, original), picture))
    return Restored(name, job.task, job.before, parameters(model), steps, seconds, scores)


def _strips(photograph: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left, middle and right third, with even sides, to be halved."""
    height, third = photograph.shape[2] // 2 * 2, photograph.shape[3] // 6 * 2
    left, middle, right = photograph[..., :height, : 3 * third].split(third, dim=3)
    return left, middle, right


def _patches(photographs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Random patches, turned and mirrored at random."""

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    patches = []
    for _ in range(BATCH):
        photograph = photographs[draw(len(photographs))][0]
        top, left = (draw(side - SIDE + 1) for side in photograph.shape[1:])
        patch = photograph[:, top : top + SIDE, left : left + SIDE].rot90(draw(4), (1, 2))
        patches.append(patch.flip(2) if draw(2) else patch)
    return torch.stack(patches)


def _side_by_side(images: Sequence[Tensor]) -> Image.Image:
    """The middle of each image, enlarged so that pixels are seen, with a white line between."""
    panels = []
    for image in images:
        top, left = ((side - CROP) // 2 for side in image.shape[2:])
        panel = image[0, :, top : top + CROP, left : left + CROP]
        panels += [panel.repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2)]
        panels += [torch.ones(panel.shape[0], CROP * ZOOM, 4)]
    pixels = (torch.cat(panels[:-1], dim=2) * 255).round().byte()
    return Image.fromarray(np.ascontiguousarray(pixels.movedim(0, -1).numpy()))
