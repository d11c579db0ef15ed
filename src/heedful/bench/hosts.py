"""The small networks in which mixers are compared: the same but for the one place where the mixer sits.

Sequence tasks: embedding, blocks of [short causal convolution, mixer, MLP], logits for every token.
Images: patches with learned positions, blocks of [mixer, MLP], mean over the image, logits.
A channel mixer does not move anything in space, so its blocks are [depthwise convolution, mixer, MLP].
A pool mixer stands once, in the place of the mean, after blocks of [depthwise convolution, MLP].
Every part is residual and looks at a normalised input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from heedful.bench.tasks.images import Images
from heedful.bench.tasks.recall import Recall
from heedful.bench.tasks.text import Text

MakeMixer = Callable[[], nn.Module]


class ShortConv(nn.Module):
    """Depthwise convolution over the `taps` last tokens, so that a token knows its neighbours before it."""

    def __init__(self, dim: int, taps: int = 4) -> None:
        super().__init__()
        self.taps = taps
        self.conv = nn.Conv1d(dim, dim, taps, groups=dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        padded = F.pad(x.transpose(1, 2), (self.taps - 1, 0))
        return self.conv(padded).transpose(1, 2)


class Conv2d(nn.Module):
    """Depthwise 3 x 3 convolution of tokens that lie on a square grid, row by row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return to_tokens(self.conv(to_grid(x)))


class OnGrid(nn.Module):
    """A mixer of maps (b, c, h, w), or of lines (b, c, n), among tokens."""

    def __init__(self, mixer: nn.Module, axes: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.axes = axes

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        if self.axes == 1:
            return self.mixer(x.transpose(1, 2)).transpose(1, 2)
        return to_tokens(self.mixer(to_grid(x)))


class Block(nn.Module):
    """x <- x + part(norm(x)) for each part in turn."""

    def __init__(self, dim: int, *parts: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in parts)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return x


class Mean(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        return x.mean(1)


class SequenceHost(nn.Module):
    """Logits for every token from the tokens up to it."""

    def __init__(self, task: Recall | Text, dim: int, depth: int, make: MakeMixer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.blocks = nn.Sequential(
            *(Block(dim, ShortConv(dim), make(), mlp(dim)) for _ in range(depth)),
            nn.LayerNorm(dim),
        )
        self.logits = nn.Linear(dim, task.classes)

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n classes"]:
        return self.logits(self.blocks(self.embedding(tokens)))


class ImageHost(nn.Module):
    """Logits for an image."""

    def __init__(self, task: Images, dim: int, depth: int, make: MakeMixer, kind: str) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            # Patches overlap by a pixel, so that a token knows what crosses its border.
            nn.Conv2d(task.channels, dim, task.patch + 2, stride=task.patch, padding=1),
            Rearrange("b c h w -> b (h w) c"),
        )
        self.positions = nn.Parameter(torch.randn(task.side**2, dim) * 0.2)
        blocks = []
        for _ in range(depth):
            if kind == "pool":
                blocks.append(Block(dim, Conv2d(dim), mlp(dim)))
            elif kind == "channel":
                blocks.append(Block(dim, Conv2d(dim), make(), mlp(dim)))
            else:
                blocks.append(Block(dim, make(), mlp(dim)))
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(dim))
        self.pool = make() if kind == "pool" else Mean()
        with torch.no_grad():
            width = self.pool(torch.ones(1, task.side**2, dim)).shape[-1]  # pool mixers may change it
        self.logits = nn.Linear(width, task.classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        x = self.patches(images) + self.positions
        return self.logits(self.pool(self.blocks(x)))


def mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


def to_grid(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b c side side"]:
    return rearrange(x, "b (h w) c -> b c h w", h=round(x.shape[1] ** 0.5))


def to_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    return rearrange(x, "b c h w -> b (h w) c")
