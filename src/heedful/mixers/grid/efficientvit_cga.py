"""Cascaded group attention of EfficientViT: heads that run one after the other on slices of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.registry import register


@register(
    "efficientvit-cga",
    kind="grid",
    paper="efficientvit-cga",
    tags=("local", "window"),
    aliases=("cascaded-group-attention", "cga"),
    spatial=(2,),
    complexity="O(N window^2 C)",
)
class CascadedGroupAttention(Mixer):
    """Heads in sequence: each attends on its slice of the channels plus what the head before it gave.

        g_i = f_i + y_{i-1},   q, k, v = ConvBN1x1(g_i),   q' = ConvBN_dw(q)
        y_i = softmax(key_dim^-1/2 q'^T k + bias_i[|dy|, |dx|]) v,   y = ConvBN1x1(relu(y_0, y_1, ...))

    f_i is the i-th of `heads` slices, y_{-1} = 0. A map with a side longer than window is padded with
    zeros (right, bottom) and cut into windows, and each is a map of its own; padded tokens take part. A
    smaller map is one window. Batch norms count padded tokens too, in training.

    dim      channels
    heads    divides dim; a head's values have dim / heads channels
    key_dim  width of queries and keys of a head
    window   side of a window
    kernels  odd side of the convolution of q, one a head (further ones are not used)

    Raises ValueError if heads does not divide dim, and on kernels that are too few or even.
    Source: EfficientViT, arXiv 2305.07027.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "key_dim": 4, "window": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        key_dim: int = 16,
        window: int = 7,
        kernels: Sequence[int] = (5, 5, 5, 5),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("key_dim", key_dim)
        check_positive("window", window)
        if len(kernels) < heads or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels is {tuple(kernels)}, must be odd sides, one for each of {heads} heads")
        self.heads = heads
        self.key_dim = key_dim
        self.window = window
        width = dim // heads
        self.qkvs = nn.ModuleList(
            _ConvBN(width, 2 * key_dim + width, device=device, dtype=dtype) for _ in range(heads)
        )
        self.dws = nn.ModuleList(
            _ConvBN(key_dim, key_dim, kernel=kernel, groups=key_dim, device=device, dtype=dtype)
            for kernel in kernels[:heads]
        )
        self.proj = nn.Sequential(nn.ReLU(), _ConvBN(dim, dim, gamma=0.0, device=device, dtype=dtype))
        # Place (|dy|, |dx|) is at |dy| * window + |dx|.
        self.attention_biases = nn.Parameter(torch.zeros(heads, window**2, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        height, width = x.shape[2:]
        if max(height, width) <= self.window:
            return self._cascade(x)
        p = self.window
        x = F.pad(x, (0, -width % p, 0, -height % p))
        rows, columns = x.shape[2] // p, x.shape[3] // p
        y = self._cascade(rearrange(x, "b c (r y) (s x) -> (b r s) c y x", y=p, x=p))
        return rearrange(y, "(b r s) c y x -> b c (r y) (s x)", r=rows, s=columns)[:, :, :height, :width]

    def _cascade(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        size = x.shape[2:]
        biases = self._biases(size)
        outputs: list[Tensor] = []
        for i, slice_ in enumerate(x.chunk(self.heads, dim=1)):  # 1
            given = slice_ + outputs[-1] if outputs else slice_  # 2
            q, k, v = self.qkvs[i](given).split([self.key_dim, self.key_dim, slice_.shape[1]], dim=1)  # 3
            q = self.dws[i](q)
            q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
            logits = (q * self.key_dim**-0.5).mT @ k + biases[i]  # 4
            outputs.append((v @ logits.softmax(-1).mT.to(v.dtype)).unflatten(2, size))
        return self.proj(torch.cat(outputs, dim=1))  # 5

    def _biases(self, size: tuple[int, ...]) -> Float[Tensor, "h n n"]:
        step = torch.arange(max(size), device=self.attention_biases.device)
        far = (step[:, None] - step).abs()
        rows, columns = (far[:side, :side] for side in size)
        places = rows[:, None, :, None] * self.window + columns[None, :, None, :]
        return self.attention_biases[:, places.flatten(2).flatten(0, 1)]


class _ConvBN(nn.Module):
    """A convolution without bias that keeps the size, then a batch norm."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        kernel: int = 1,
        groups: int = 1,
        gamma: float = 1.0,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            dim,
            dim_out,
            kernel,
            padding=kernel // 2,
            groups=groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(dim_out, device=device, dtype=dtype)
        nn.init.constant_(self.bn.weight, gamma)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c2 height width"]:
        return self.bn(self.c(x))
