"""TSM2: time series forecast by selective mixers over patches of time and over variates."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_positive
from heedful.mixers.scan.mambamixer import SelectiveTokenMixer
from heedful.models.mambamixer import WeightedEarlierFeatures
from heedful.registry import register


@register("tsm2", kind="model", paper="mambamixer", tags=("state space", "time series", "channels"))
class TSM2(nn.Module):
    """A forecast of several series at once, from a window of their past.

        z = (x - mean) / (std + eps) of each series,  patches of z -> tokens, plus learned places
        T_l = t + along_time(LN(t)),  C_l = c + along_variates(LN(c)),  t and c as in `MambaMixer`
        y = W flatten(norms(C_last)), scaled back

    along_time is causal and sees one series, along_variates goes both ways and sees one patch of all. Norms
    of the result are over channels, then over patches. Weights of earlier features go through a softmax.

    length, horizon   steps seen and steps forecast
    dim, depth        channels, blocks
    patch, stride     steps of a patch and between patches
    state_dim, conv_size, expand   as in `heedful.mixers.scan.mambamixer.SelectiveTokenMixer`

    forward: x (b, length, variates), any number of variates, gives (b, horizon, variates). Norms and
    residuals of a block follow a reimplementation by others. Raises ValueError on sizes that do not fit.
    Source: MambaMixer, arXiv 2403.19888.
    """

    example: ClassVar[dict[str, Any]] = {
        "length": 20,
        "horizon": 6,
        "dim": 8,
        "depth": 2,
        "patch": 8,
        "stride": 4,
        "state_dim": 2,
        "expand": 1,
    }

    def __init__(
        self,
        length: int,
        horizon: int,
        *,
        dim: int = 128,
        depth: int = 2,
        patch: int = 16,
        stride: int = 8,
        state_dim: int = 16,
        conv_size: int = 3,
        expand: int = 2,
    ) -> None:
        super().__init__()
        for name, value in (("horizon", horizon), ("depth", depth), ("patch", patch), ("stride", stride)):
            check_positive(name, value)
        if length < patch:
            raise ValueError(f"length is {length}, must be at least patch, which is {patch}")
        self.length, self.patch, self.stride = length, patch, stride
        patches = (length - patch) // stride + 1
        self.enter = nn.Linear(patch, dim)
        self.places = nn.Parameter(0.02 * torch.randn(patches, dim))
        how: dict[str, Any] = {"state_dim": state_dim, "conv_size": conv_size, "expand": expand}
        numbers = range(1, depth + 1)
        self.time = nn.ModuleList(SelectiveTokenMixer(dim, causal=True, **how) for _ in numbers)
        self.variates = nn.ModuleList(SelectiveTokenMixer(dim, **how) for _ in numbers)
        self.time_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in numbers)
        self.variate_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in numbers)
        self.to_time, self.to_variates = nn.ModuleList(), nn.ModuleList()
        for number in numbers:
            sums: dict[str, Any] = {"start": (False, False), "normalized": True}
            self.to_time.append(WeightedEarlierFeatures(number, number, **sums))
            self.to_variates.append(WeightedEarlierFeatures(number + 1, number, **sums))
        self.channel_norm, self.patch_norm = nn.LayerNorm(dim), nn.LayerNorm(patches)
        self.out = nn.Linear(patches * dim, horizon)

    def forward(self, x: Float[Tensor, "b n m"]) -> Float[Tensor, "b horizon m"]:
        if x.ndim != 3 or x.shape[1] != self.length:
            raise ValueError(f"x has shape {tuple(x.shape)}, must be (batch, {self.length}, variates)")
        mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0) + 1e-5
        patches = ((x - mean) / scale).mT.unfold(2, self.patch, self.stride)  # b m p patch
        first = self.enter(patches) + self.places
        tokens, channels = [first], [first]
        layers = (self.time, self.variates, self.time_norms, self.variate_norms)
        sums = zip(self.to_time, self.to_variates, strict=True)
        for (along_time, along_variates, norm, variate_norm), (to_time, to_variates) in zip(
            zip(*layers, strict=True), sums, strict=True
        ):
            t = to_time(tokens, channels)
            tokens.append(t + along_time(norm(t).flatten(0, 1)).view_as(t))
            c = to_variates(tokens, channels)
            turned = rearrange(variate_norm(c), "b m p c -> (b p) m c")
            channels.append(c + rearrange(along_variates(turned), "(b p) m c -> b m p c", b=len(x)))
        y = self.patch_norm(self.channel_norm(channels[-1]).mT).mT
        return self.out(y.flatten(2)).mT * scale + mean
