"""FIT: tokens mix inside their groups, a few latents a group mix over all of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.models.block import make_norm
from heedful.models.fit_stage import Made, Stage, parse_layers
from heedful.registry import register


class Trunk(nn.Module):
    """What FIT and FITAR share: the places of tokens in a group, the latents, and the stages."""

    def __init__(
        self,
        dim: int,
        *,
        groups: int,
        group_size: int,
        latents: int,
        latent_dim: int | None,
        layers: str,
        heads: int,
        latent_heads: int | None,
        mlp_ratio: int,
        causal: bool,
        local_causal: bool,
        conditioned: bool = False,
        made: Made,
    ) -> None:
        super().__init__()
        for name, value in (("groups", groups), ("group_size", group_size), ("latents", latents)):
            check_positive(name, value)
        latent_dim = dim if latent_dim is None else latent_dim
        pairs = parse_layers(layers)
        self.place = nn.Parameter(torch.empty(group_size, dim, **made).normal_(std=0.02))
        self.latents = nn.Parameter(torch.empty(groups, latents, latent_dim, **made).normal_(std=0.02))
        self.stages = nn.ModuleList(
            Stage(
                dim,
                latent_dim,
                depth=pair,
                latents=latents,
                heads=heads,
                latent_heads=latent_heads or heads,
                mlp_ratio=mlp_ratio,
                causal=causal,
                local_causal=local_causal,
                written=i + 1 < len(pairs),
                conditioned=conditioned,
                made=made,
            )
            for i, pair in enumerate(pairs)
        )

    def forward(
        self, x: Float[Tensor, "b t n c"], given: Float[Tensor, "b k d"] | None = None
    ) -> tuple[Float[Tensor, "b t n c"], Float[Tensor, "b t m d"]]:
        """given: the tokens that the latents read, where they are conditioned."""
        x = x + self.place
        latents = self.latents[: x.shape[1]].expand(len(x), -1, -1, -1)
        for stage in self.stages:
            x, latents = stage(x, latents, given)
        return x, latents


@register("fit", kind="model", paper="fit", tags=("groups", "latents"), complexity="O(N n C + (t m)^2 C)")
class FIT(nn.Module):
    """Groups of tokens with layers of their own, tied together by latents.

        x = norm(x W) + place,  z = learned latents                         of t groups of n and m
        a stage  x = local(x);  z = global(z + read(z, x));  x = x + write(x, z)
        the last stage writes nothing back; in the end both are normed

    channels    of the input
    dim         channels of tokens;  latent_dim: of latents, None: as many
    layers      "(a)b(c)": a local layers, b global ones, c local ones, and so on
    groups      t;  group_size: n, tokens a group;  latents: m, latents a group
    heads       of the local layers, latent_heads: of the global ones, None: as many; attention between
                the two has the smaller number
    mlp_ratio   inner width of the MLPs
    causal      latents see those of their own group and of groups before it

    forward: x (b, t, n, channels), gives the tokens (b, t, n, dim) and the latents (b, t, m, latent_dim).
    Without global layers in the last stage its tokens have seen all latents of the stage before.
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
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        self.channels = channels
        self.stem = nn.Linear(channels, dim, **made)
        self.stem_norm = make_norm("layer", dim, **made)
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
            causal=causal,
            local_causal=False,
            made=made,
        )
        self.norm = make_norm("layer", dim, **made)
        self.latent_norm = make_norm("layer", latent_dim or dim, **made)

    def example_inputs(self, *, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments for a small `forward` call."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, len(self.trunk.latents), len(self.trunk.place), self.channels)
        return {"x": torch.randn(shape, generator=generator)}

    def forward(
        self, x: Float[Tensor, "b t n c"]
    ) -> tuple[Float[Tensor, "b t n d"], Float[Tensor, "b t m e"]]:
        wanted = (len(self.trunk.latents), len(self.trunk.place), self.channels)
        if x.ndim != 4 or x.shape[1:] != wanted:
            raise ValueError(f"x has shape {tuple(x.shape)}, must be (batch, {', '.join(map(str, wanted))})")
        x, latents = self.trunk(self.stem_norm(self.stem(x)))
        return self.norm(x), self.latent_norm(latents)
