"""Rotary position embedding: channels in pairs, turned by angles that grow with the position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from heedful.checks import check_choice, check_positive

PAIRINGS = ("half", "interleaved")


def rotary_angles(
    positions: Shaped[Tensor, "..."],
    dim: int,
    *,
    base: float = 10000.0,
    axes: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "... pairs"]:
    """Angles of rotary position embedding, (*positions, dim / 2).

        angle[p, j] = p * base ** (-2 j / dim)

    positions  whole or broken numbers, any shape; with axes > 1 the last axis holds the coordinates
    dim        channels that are turned: an even number, and a multiple of 2 * axes
    axes       1 to 3: `dim` is split evenly, and the pairs of the first axis come first
    dtype      of the angles; half precision cannot hold them and is taken as float32

    Raises ValueError if `dim` does not split or positions do not have `axes` coordinates.
    Source: RoFormer, arXiv 2104.09864.
    """
    check_positive("dim", dim)
    check_choice("axes", axes, (1, 2, 3))
    if dim % (2 * axes):
        raise ValueError(f"dim is {dim}, must be a multiple of {2 * axes} to split into pairs on {axes} axes")
    if axes > 1 and (positions.ndim == 0 or positions.shape[-1] != axes):
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}, must end in {axes}, the number of axes"
        )
    dtype = torch.promote_types(dtype, torch.float32)
    width = dim // axes
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width
    angles = positions.to(dtype)[..., None] * base**-exponent
    return angles if axes == 1 else angles.flatten(-2)


@dataclass(frozen=True)
class Yarn:
    """YaRN: rotary positions stretched for texts `factor` times as long as those of the training.

        pair j turns f_j times as fast,  f_j = 1 - r_j (1 - 1 / factor)
        r_j rises in a line from 0 at the pair with `beta_fast` turns in `original_length` to 1 at `beta_slow`

    factor           of the lengths, at least 1
    original_length  tokens of the training
    mscale           cos and sin are multiplied by m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln(factor) + 1
    mscale_all_dim   logits are multiplied by m(mscale_all_dim)^2

    Raises ValueError for a factor below 1. Source: YaRN, arXiv 2309.00071; the two scales are DeepSeek's.
    """

    factor: float
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"factor is {self.factor}, must be at least 1")
        check_positive("original_length", self.original_length)

    def slowing(self, dim: int, base: float) -> Float[Tensor, " pairs"]:
        """f, by which the angles of `rotary_angles` are multiplied."""

        def pair(turns: float) -> float:
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(math.floor(pair(self.beta_fast)), 0)
        last = min(math.ceil(pair(self.beta_slow)), dim - 1)
        width = last - first or 0.001
        ramp = ((torch.arange(dim // 2, dtype=torch.float64) - first) / width).clamp(0, 1)
        return 1 - ramp * (1 - 1 / self.factor)

    @property
    def length(self) -> float:
        """What cos and sin are multiplied by."""
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    @property
    def logit_factor(self) -> float:
        """What logits are multiplied by beside."""
        return self._m(self.mscale_all_dim) ** 2

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1


def rotate(
    x: Float[Tensor, "*bh n d"],
    angles: Float[Tensor, "..."] | tuple[Float[Tensor, "..."], Float[Tensor, "..."]],
    *,
    pairing: str = "half",
) -> Float[Tensor, "*bh n d"]:
    """Turn each pair of channels (u, v) of x by its angle: (u cos - v sin, v cos + u sin).

    angles   (n, r), (b, n, r) for all heads of x (b, h, n, d), or one for each row of x; or (cos, sin) of
             such angles. The first 2 r channels are turned, the rest stay as they are.
    pairing  "half": channel j goes with j + r; "interleaved": channel 2 j goes with 2 j + 1

    Computed in float32 at least, given back in the dtype of x. Raises ValueError if 2 r > d.
    Source: RoFormer, arXiv 2104.09864 (interleaved); GPT-NeoX and LLaMA as released (half).
    """
    check_choice("pairing", pairing, PAIRINGS)
    cos, sin = angles if isinstance(angles, tuple) else (angles.cos(), angles.sin())
    if cos.ndim == x.ndim - 1:
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    pairs = cos.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"angles has {pairs} pairs a position, must be at most {x.shape[-1] // 2} to fit x")
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    shape = (2, pairs) if pairing == "half" else (pairs, 2)
    u, v = turned.unflatten(-1, shape).unbind(-2 if pairing == "half" else -1)
    turned = torch.stack([u * cos - v * sin, v * cos + u * sin], dim=-2 if pairing == "half" else -1)
    return torch.cat([turned.flatten(-2).to(x.dtype), rest], dim=-1)
