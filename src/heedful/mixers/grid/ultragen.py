"""UltraGen: attention in windows of a video at full resolution, and over all of it at a lower one."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.ops.rotary import rotary_angles, rotate
from heedful.patterns.split_windows import SplitWindows
from heedful.registry import register

_SINUSOIDS = 256  # channels that describe a timestep


@register(
    "ultragen",
    kind="grid",
    paper="ultragen",
    tags=("sparse", "local", "window", "video"),
    spatial=(3,),
    complexity="O((N / K^2 + N / k^4) N C)",
    extra_inputs=("timestep",),
)
class GlobalLocalVideoAttention(Mixer):
    """Attention in windows of space and attention over a compressed video, joined by gates of time.

        local    Z_l: windows x windows windows of all frames (one more each way in odd layers)
        coarse   Z_h: the video compressed by k, max(1, windows // 2) windows each way (again one more)
        Z_l <- a_l(t) Z_h + (1 - a_l(t)) Z_l
        global   Z_g: the video compressed by k, all of it, then upsampled and refined by a 3-D convolution
        y = a(t) Z_g + (1 - a(t)) Z_l

    All attend with the same W_q, W_k, W_v, W_o; the coarse and the global level add low-rank W B A to the
    first three. Queries and keys are turned by rotary positions in time, height and width, compressed tokens
    by those of their centre. Compression is a depthwise convolution of k x k with stride k that starts as
    an average; sides that k does not divide are filled up by their last row or column. a_l and a are an MLP
    of the sinusoids of t and a sigmoid, for each channel. Not given by the paper, and chosen here: the
    sigmoid, the positions, the filling, and a refinement that is depthwise and starts as the identity.

    dim      channels
    heads    divides dim
    windows  K, windows along each side, e.g. 2 at 1080p, 4 at 4K
    compress k, e.g. 4
    rank     of the low-rank terms, e.g. 64
    layer    number of the layer
    qkv_bias whether the projection of queries, keys and values has a bias

    Raises ValueError if heads does not divide dim, or windows, compress or rank is not positive.
    Source: UltraGen, arXiv 2510.18775.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 2, "windows": 2, "compress": 2, "rank": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        windows: int,
        compress: int,
        rank: int,
        layer: int = 0,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("windows", windows)
        check_positive("compress", compress)
        check_positive("rank", rank)
        self.heads, self.compress = heads, compress
        self.windows = windows + layer % 2
        self.coarse_windows = max(1, windows // 2) + layer % 2
        self.turned = dim // heads // 6 * 6  # channels of a head that rotary positions turn
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **how)
        self.proj = nn.Linear(dim, dim, **how)
        self.coarse = _Compressed(dim, compress, rank, **how)
        self.whole = _Compressed(dim, compress, rank, **how)
        self.refine = nn.Conv3d(dim, dim, 3, padding=1, groups=dim, bias=False, **how)
        self.coarse_gate, self.whole_gate = _gate(dim, **how), _gate(dim, **how)
        with torch.no_grad():
            self.refine.weight.zero_()[:, :, 1, 1, 1] = 1

    def example_inputs(
        self,
        *,
        batch: int = 2,
        length: int = 11,
        size: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        inputs = super().example_inputs(batch=batch, length=length, size=size, dtype=dtype, seed=seed)
        return inputs | {"timestep": torch.linspace(900, 100, batch, dtype=torch.float64).to(dtype)}

    def forward(
        self, x: Float[Tensor, "b c t height width"], *, timestep: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b c t height width"]:
        """timestep: of the diffusion, for each batch row; None: 0."""
        check_map("x", x, self.dim, self.entry.spatial)
        time = x.new_zeros(x.shape[0]) if timestep is None else timestep
        if time.shape != x.shape[:1]:
            raise ValueError(f"timestep has shape {tuple(time.shape)}, must be ({x.shape[0]},)")
        embedding = _sinusoids(time).to(self.proj.weight.dtype)
        # 1. Windows at full resolution.
        local = self._attend(x, self.windows)
        # 2. The whole video, compressed.
        whole = self.refine(self._attend_compressed(x, self.whole, 1))
        # 3. Larger windows of the compressed video.
        coarse = self._attend_compressed(x, self.coarse, self.coarse_windows)
        # 4. Gates of time join them.
        near, far = (
            gate(embedding).sigmoid()[..., None, None, None].to(local.dtype)
            for gate in (self.coarse_gate, self.whole_gate)
        )
        local = near * coarse + (1 - near) * local
        return far * whole + (1 - far) * local

    def _attend_compressed(
        self, x: Float[Tensor, "b c t height width"], level: _Compressed, windows: int
    ) -> Float[Tensor, "b c t height width"]:
        frames, height, width = x.shape[2:]
        z = self._attend(level.pool(x), windows, level)
        z = rearrange(z, "b c t h w -> (b t) c h w")
        z = F.interpolate(z, scale_factor=self.compress, mode="bilinear")[..., :height, :width]
        return rearrange(z, "(b t) c h w -> b c t h w", t=frames)

    def _attend(
        self, x: Float[Tensor, "b c t height width"], windows: int, level: _Compressed | None = None
    ) -> Float[Tensor, "b c t height width"]:
        """Attention in windows x windows windows, at full resolution or at a compressed level."""
        size = tuple(x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens) if level is None else self.qkv(tokens) + level.low_rank(tokens)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if self.turned:
            angles = self._angles(size, 1 if level is None else self.compress, x)
            q, k = (rotate(t, angles, pairing="interleaved") for t in (q, k))
        pattern = None if windows == 1 else SplitWindows(size, (1, windows, windows))
        y = self.proj(rearrange(attention(q, k, v, pattern=pattern), "b h n d -> b n (h d)"))
        return y.transpose(1, 2).unflatten(2, size)

    def _angles(self, size: tuple[int, ...], cell: int, x: Tensor) -> Float[Tensor, "n r"]:
        """Rotary angles of the centres of cells of 1 x cell x cell tokens."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        axes = [
            torch.arange(length, device=x.device, dtype=dtype) * side + (side - 1) / 2
            for length, side in zip(size, (1, cell, cell), strict=True)
        ]
        positions = torch.cartesian_prod(*axes)
        return rotary_angles(positions, self.turned, axes=3, dtype=dtype)


class _Compressed(nn.Module):
    """A compressed level: its convolution, and its low-rank additions to the projection."""

    def __init__(
        self,
        dim: int,
        compress: int,
        rank: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.side = compress
        self.conv = nn.Conv3d(
            dim,
            dim,
            (1, compress, compress),
            stride=(1, compress, compress),
            groups=dim,
            bias=False,
            device=device,
            dtype=dtype,
        )
        nn.init.constant_(self.conv.weight, compress**-2)
        self.down = nn.Linear(dim, 3 * rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Parameter(torch.zeros(3, dim, rank, device=device, dtype=dtype))

    def pool(self, x: Float[Tensor, "b c t height width"]) -> Float[Tensor, "b c t h2 w2"]:
        height, width = x.shape[3:]
        return self.conv(F.pad(x, (0, -width % self.side, 0, -height % self.side, 0, 0), mode="replicate"))

    def low_rank(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c3"]:
        parts = self.down(tokens).unflatten(-1, (3, -1))
        return torch.einsum("bntr,tcr->bntc", parts, self.up.to(parts.dtype)).flatten(2)


def _gate(dim: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(_SINUSOIDS, dim, device=device, dtype=dtype),
        nn.SiLU(),
        nn.Linear(dim, dim, device=device, dtype=dtype),
    )


def _sinusoids(time: Float[Tensor, " b"]) -> Float[Tensor, "b channels"]:
    """cos and sin of t / 10000^(j / 128), j = 0 ... 127."""
    time = time.to(torch.promote_types(time.dtype, torch.float32))
    half = _SINUSOIDS // 2
    steps = torch.arange(half, device=time.device, dtype=time.dtype) / half
    angles = time[:, None] * torch.exp(-math.log(10000.0) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
