"""What convolutional backbones share: squeeze-excite; SHViT and EfficientViT: stem and merging of patches."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from heedful.mixers.squeeze_excite import SqueezeExcite as SqueezeExcite
from heedful.models.parts import ConvNorm, DropPath


class Residual(nn.Module):
    """y = x + module(x)."""

    def __init__(self, module: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.module = module
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return x + self.drop_path(self.module(x))


class ConvFFN(nn.Sequential):
    """Two 1 x 1 convolutions, twice as wide between them; the last norm starts at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, 2 * dim)
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(2 * dim, dim, gamma=0.0)


class PatchMerging(nn.Sequential):
    """Half the map, through 4 times the channels: 1 x 1, depthwise of stride 2, squeeze-excite, 1 x 1."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvNorm(dim, hidden)
        self.act1 = nn.ReLU()
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=2, groups=hidden)
        self.act2 = nn.ReLU()
        self.se = SqueezeExcite(hidden, max(8, (hidden // 4 + 4) // 8 * 8))  # dim, as a multiple of 8
        self.conv3 = ConvNorm(hidden, out)


def depthwise(dim: int, drop_path: float = 0.0) -> Residual:
    """A residual 3 x 3 depthwise convolution whose norm starts at 0."""
    return Residual(ConvNorm(dim, dim, 3, groups=dim, gamma=0.0), drop_path)


def stem16(in_channels: int, dim: int) -> nn.Sequential:
    """Four strided convolutions to a sixteenth of the image's side."""
    layers: list[nn.Module] = [ConvNorm(in_channels, dim // 8, 3, stride=2)]
    for part in (8, 4, 2):
        layers += [nn.ReLU(), ConvNorm(dim // part, 2 * dim // part, 3, stride=2)]
    return nn.Sequential(*layers)


def merge(dim: int, out: int) -> list[nn.Module]:
    """What stands between two stages: patches are merged between two pairs of convolution and FFN."""
    return [
        nn.Sequential(depthwise(dim), Residual(ConvFFN(dim))),
        PatchMerging(dim, out),
        nn.Sequential(depthwise(out), Residual(ConvFFN(out))),
    ]
