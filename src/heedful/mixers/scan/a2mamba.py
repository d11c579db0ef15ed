"""MASS: two neighborhood attentions whose weights also mix the states of a selective scan over the map."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.grid.rala import grid_angles
from heedful.mixers.mixer import Mixer
from heedful.mixers.scan.selective_ssm import SelectiveSSM
from heedful.ops.attention import attention
from heedful.ops.neighborhood import NeighborhoodMap
from heedful.ops.precision import no_autocast
from heedful.ops.rotary import rotate
from heedful.registry import register

Maps = list[tuple[NeighborhoodMap, Tensor]]  # a neighborhood, and the weights (b, h, n, k) of half the heads


class AttentionAugmentedSSM(nn.Module):
    """A selective scan of a map, row by row, whose states are averaged over neighborhoods before reading.

        u = silu(DWConv5x5(x)),  h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t
        s = W_s (attn_1 h_1, attn_2 h_2),  y_t = C_t s_t + D u_t

    with one number of state a channel, h_1 and h_2 the halves of the channels, and W_s over heads. Without
    attention maps s is h. Source: A2Mamba, arXiv 2507.16624.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, device=device, dtype=dtype)
        self.ssm = SelectiveSSM(dim, routes=1, state_dim=1, device=device, dtype=dtype)
        self.fuse = nn.Linear(heads, heads, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b c height width"], maps: Maps | None = None
    ) -> Float[Tensor, "b c height width"]:
        """The result is float32, or float64 if x is."""
        u = F.silu(self.conv(x)).flatten(2)
        h, read = (t[:, 0] for t in self.ssm.hidden(u[:, None]))
        with no_autocast(x):
            if maps is not None:
                states = rearrange(h, "b (m h d) n -> m b h n d", m=len(maps), h=self.heads // 2)
                found = [
                    near.average(weights.to(h.dtype), part)
                    for (near, weights), part in zip(maps, states, strict=True)
                ]
                mixed = F.linear(
                    torch.cat(found, dim=1).movedim(1, -1),
                    self.fuse.weight.to(h.dtype),
                    self.fuse.bias.to(h.dtype),
                )
                h = rearrange(mixed, "b n d h -> b (h d) n")
            y = h * read + self.ssm.skip.to(h.dtype).T * u
        return y.view_as(x)


@register(
    "a2mamba",
    kind="grid",
    paper="a2mamba",
    tags=("state space", "local", "window", "gate"),
    aliases=("mass", "a2ssm"),
    spatial=(2,),
    complexity="O(N C (C + W)), W keys in a window",
)
class MultiScaleAttentionAugmentedSSM(Mixer):
    """Half of the heads attend nearby, half at a distance; their weights then mix the states of a scan.

        q, k, v = W x,  gate = silu(BN(W_g x)),  attn_i = softmax(d^-0.5 q_i . k_i + bias), heads' half i
        v_1' = attn_1 v_1,  v_2' = attn_2 (v_1' + v_2)
        y = W_o norm((norm(ssm(v_1', v_2'; attn_1, attn_2)) + DWConv5x5(v)) * gate)

    attn_1 sees the window x window tokens around a token, attn_2 as many of the whole map, with the dilation
    min(side // window, window) along an axis; both windows move inward at the borders. Queries and keys are
    turned by their place. bias: one learned table by relative place, the same for both.

    dim     channels
    heads   even; divides dim and leaves a multiple of 4 channels a head
    window  odd side of the windows, in tokens; on a smaller map the whole axis

    Raises ValueError on heads or a window that do not fit. Source: A2Mamba, arXiv 2507.16624.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 2, "window": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        if heads % 2 or dim // heads % 4:
            raise ValueError(
                f"heads is {heads}, must be even and leave a multiple of 4 channels a head, "
                f"not {dim // heads}"
            )
        check_positive("window", window)
        if window % 2 == 0:
            raise ValueError(f"window is {window}, must be odd")
        self.heads, self.window = heads, window
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, device=device, dtype=dtype)
        self.gate = nn.Conv2d(dim, dim, 1, device=device, dtype=dtype)
        self.gate_norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, device=device, dtype=dtype)
        table = torch.empty(heads // 2, 2 * window - 1, 2 * window - 1, device=device, dtype=dtype)
        self.bias = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self._make_last(dim, device, dtype)
        self.norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.out_norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        size = (x.shape[2], x.shape[3])
        gate = F.silu(self.gate_norm(self.gate(x)))  # 1
        q, k, v = self.qkv(x).chunk(3, dim=1)
        local = self.lepe(v)
        q, k, v = (rearrange(t, "b (h d) y x -> b h (y x) d", h=self.heads) for t in (q, k, v))
        angles = grid_angles(size, q.shape[-1], like=q)  # 2
        q, k = (rotate(t, angles, pairing="interleaved") for t in (q, k))
        q = q * q.shape[-1] ** -0.5
        near, far = self.neighborhoods(size)  # 3
        (q1, q2), (k1, k2), (v1, v2) = (t.chunk(2, dim=1) for t in (q, k, v))
        attn1 = (near.logits(q1, k1) + near.bias(self.bias)).softmax(-1).to(v.dtype)
        v1 = near.average(attn1, v1)
        attn2 = (far.logits(q2, k2) + far.bias(self.bias)).softmax(-1).to(v.dtype)
        v2 = far.average(attn2, v1 + v2)
        y = self._last(torch.cat([v1, v2], dim=1), q, k, [(near, attn1), (far, attn2)], size)  # 4
        y = self.norm(y.to(x.dtype).movedim(1, -1)) + local.movedim(1, -1)  # 5
        return self.out(self.out_norm(y * gate.movedim(1, -1))).movedim(-1, 1)

    def neighborhoods(self, size: tuple[int, int]) -> tuple[NeighborhoodMap, NeighborhoodMap]:
        """Who sees whom in the two halves of the heads, on a map of this size."""
        window = (min(self.window, size[0]), min(self.window, size[1]))
        dilation = tuple(max(1, min(side // self.window, self.window)) for side in size)
        return NeighborhoodMap(size, window), NeighborhoodMap(size, window, (dilation[0], dilation[1]))

    def _make_last(self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.ssm = AttentionAugmentedSSM(dim, heads=self.heads, device=device, dtype=dtype)

    def _last(self, v: Tensor, q: Tensor, k: Tensor, maps: Maps, size: tuple[int, int]) -> Tensor:
        """The state space, over the values that the two attentions gave."""
        return self.ssm(rearrange(v, "b h (y x) d -> b (h d) y x", y=size[0]), maps)


@register(
    "a2mamba-global",
    kind="grid",
    paper="a2mamba",
    tags=("dense", "local", "window", "gate"),
    spatial=(2,),
    complexity="O(N^2 C)",
)
class A2MambaGlobalAttention(MultiScaleAttentionAugmentedSSM):
    """MASS of the last stage: attention over the whole map in place of the state space.

        y = softmax(d^-0.5 q . k + bias) (v_1', v_2'), with the turned queries and keys of all heads

    size: (height, width) of the maps trained on; on others the table of biases, of every pair of tokens, is
    resized (bicubic). Other arguments and errors as in `MultiScaleAttentionAugmentedSSM`.
    Source: A2Mamba, arXiv 2507.16624.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 2, "window": 3, "size": (9, 7)}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        size: tuple[int, int] = (7, 7),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, side in zip(("size[0]", "size[1]"), size, strict=True):
            check_positive(name, side)
        self._tokens = math.prod(size)
        super().__init__(dim, heads=heads, window=window, device=device, dtype=dtype)

    def _make_last(self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        table = torch.empty(1, self.heads, self._tokens, self._tokens, device=device, dtype=dtype)
        self.global_bias = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def _last(self, v: Tensor, q: Tensor, k: Tensor, maps: Maps, size: tuple[int, int]) -> Tensor:
        n = math.prod(size)
        bias: Tensor = self.global_bias
        if n != bias.shape[-1]:
            bias = F.interpolate(bias, size=(n, n), mode="bicubic", align_corners=False)
        y = attention(q, k, v, bias=bias, scale=1.0)
        return rearrange(y, "b h (y x) d -> b (h d) y x", y=size[0])
