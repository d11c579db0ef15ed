"""What backbones share: norms, MLPs, stochastic depth, layer scale, convolution with norm, positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class DropPath(nn.Module):
    """Stochastic depth: in training a row of the batch is dropped with probability `rate`, else scaled up.

    y_b = x_b keep_b / (1 - rate),   keep_b ~ Bernoulli(1 - rate)
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate is {rate!r}, must be at least 0 and below 1")
        self.rate = rate

    def forward(self, x: Float[Tensor, "b *rest"]) -> Float[Tensor, "b *rest"]:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(depths: Sequence[int], rate: float) -> list[list[float]]:
    """Rates growing linearly from 0 to `rate` over all blocks; one list a stage."""
    last = max(sum(depths) - 1, 1)
    rates = [rate * block / last for block in range(sum(depths))]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


class LayerScale(nn.Module):
    """y = gamma x, one gamma a channel, `axis` being that of the channels."""

    def __init__(self, dim: int, *, init: float = 1e-6, axis: int = 1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x * self.gamma.view(shape)


class ConvNorm(nn.Sequential):
    """A convolution without bias, then BatchNorm2d whose weight starts at `gamma`."""

    def __init__(
        self,
        dim: int,
        out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(dim, out, kernel, stride=stride, padding=padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        nn.init.constant_(self.norm.weight, gamma)


class Mlp(nn.Module):
    """fc2(act(fc1(x))) on the last axis."""

    def __init__(
        self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.GELU, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows c"]:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class ConvMlp(nn.Module):
    """fc2(act(fc1(x))) on the channels of a map, as 1 x 1 convolutions."""

    def __init__(
        self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.GELU, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class ResidualConvMlp(ConvMlp):
    """fc2(h + DWConv3x3(h)), h = act(fc1(x)), on the channels of a map."""

    def __init__(self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__(dim, hidden, act=act)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden + self.dwconv(hidden))


def init_linear(module: nn.Module) -> None:
    """For `apply`: linear maps start at a normal of deviation 0.02, cut off, their biases at 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_table(
    table: Float[Tensor, "... old c"], old: tuple[int, int], new: tuple[int, int], *, mode: str = "bicubic"
) -> Float[Tensor, "... new c"]:
    """A table of learned positions of an old[0] x old[1] grid (row by row), interpolated to another grid."""
    if old == new:
        return table
    grid = table.reshape(-1, *old, table.shape[-1]).movedim(-1, 1)
    grid = F.interpolate(grid, size=new, mode=mode, align_corners=False)
    return grid.movedim(1, -1).reshape(*table.shape[:-2], new[0] * new[1], table.shape[-1])
