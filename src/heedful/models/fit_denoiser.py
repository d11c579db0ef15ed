"""FIT as the network of a diffusion model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_tokens
from heedful.models.block import make_norm
from heedful.models.fit import Trunk
from heedful.models.fit_stage import Made
from heedful.ops.rotary import rotary_angles
from heedful.registry import register


class TimeEmbedding(nn.Module):
    """Times to vectors: W silu(W' e), e the sines and cosines of 1000 time, made mean 0 and spread 1."""

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if dim % 8:
            raise ValueError(
                f"latent_dim is {dim}, must be a multiple of 8 for the sines and cosines of time"
            )
        self.width = dim // 4
        self.wide = nn.Linear(self.width, dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b c"]:
        angles = rotary_angles(1000 * time, self.width, dtype=time.dtype)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        waves = (waves - waves.mean(-1, keepdim=True)) / waves.std(-1, correction=0, keepdim=True)
        return self.out(F.silu(self.wide(waves.to(self.wide.weight.dtype))))


@register(
    "fit-denoiser",
    kind="model",
    paper="fit",
    tags=("groups", "latents", "diffusion"),
    complexity="O(N n C + (t m)^2 C)",
)
class FITDenoiser(nn.Module):
    """FIT whose latents also read the time and tokens to go by; predicts a map of the shape of its input.

        behind each read, all latents: z = z + attention(norm(z), norm([time, condition]))
        y = norm(x) W_out

    The arguments are those of `FIT`; latent_dim is a multiple of 8.

    forward: x (b, t, n, channels), time (b) in [0, 1], condition (b, k, latent_dim) or None; gives what is
    predicted, (b, t, n, channels), and the latents (b, t, m, latent_dim).
    Raises ValueError if heads do not divide, on wrong shapes and on layers that are written otherwise.
    Source: FIT, arXiv 2305.12689.
    """

    example: ClassVar[dict[str, Any]] = {
        "channels": 3,
        "dim": 16,
        "layers": "(1)1(1)",
        "groups": 3,
        "group_size": 4,
        "latents": 2,
        "heads": 4,
    }

    def __init__(
        self,
        channels: int,
        dim: int = 512,
        *,
        layers: str = "(2)4(2)4(2)",
        groups: int,
        group_size: int,
        latents: int,
        latent_dim: int | None = None,
        heads: int = 8,
        latent_heads: int | None = None,
        mlp_ratio: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        self.channels, self.latent_dim = channels, latent_dim or dim
        self.stem = nn.Linear(channels, dim, **made)
        self.stem_norm = make_norm("layer", dim, **made)
        self.time = TimeEmbedding(self.latent_dim, **made)
        self.trunk = Trunk(
            dim,
            groups=groups,
            group_size=group_size,
            latents=latents,
            latent_dim=latent_dim,
            layers=layers,
            heads=heads,
            latent_heads=latent_heads,
            mlp_ratio=mlp_ratio,
            causal=False,
            local_causal=False,
            conditioned=True,
            made=made,
        )
        self.norm = make_norm("layer", dim, **made)
        self.out = nn.Linear(dim, channels, **made)

    def example_inputs(self, *, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, len(self.trunk.latents), len(self.trunk.place), self.channels)
        return {
            "x": torch.randn(shape, generator=generator),
            "time": torch.rand(batch, generator=generator),
        }

    def forward(
        self,
        x: Float[Tensor, "b t n c"],
        time: Float[Tensor, " b"],
        *,
        condition: Float[Tensor, "b k d"] | None = None,
    ) -> tuple[Float[Tensor, "b t n c"], Float[Tensor, "b t m d"]]:
        wanted = (len(self.trunk.latents), len(self.trunk.place), self.channels)
        if x.ndim != 4 or x.shape[1:] != wanted:
            raise ValueError(f"x has shape {tuple(x.shape)}, must be (batch, {', '.join(map(str, wanted))})")
        if time.shape != x.shape[:1]:
            raise ValueError(f"time has shape {tuple(time.shape)}, must be ({len(x)},)")
        given = self.time(time)[:, None]
        if condition is not None:
            check_tokens("condition", condition, self.latent_dim)
            given = torch.cat([given, condition], dim=1)
        x, latents = self.trunk(self.stem_norm(self.stem(x)), given)
        return self.out(self.norm(x)), latents
