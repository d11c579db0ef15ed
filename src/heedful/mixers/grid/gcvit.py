"""Global context attention: windows whose queries are their own, or one set made from the whole map."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from heedful.checks import check_divides, check_map, check_positive
from heedful.mixers.mixer import Mixer
from heedful.ops.attention import attention
from heedful.registry import register

_WINDOWS = "b (r y) (s x) c -> (b r s) (y x) c"


class _WindowMixer(Mixer):
    """Attention inside windows that do not overlap, with a learned bias for each relative place.

    A map that the window does not divide is padded (right, bottom) with hidden tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window: int,
        qkv_bias: bool,
        projections: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        check_positive("window", window)
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, projections * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        # Place (dy, dx) of the query minus the key is at (dy + window - 1) (2 window - 1) + dx + window - 1.
        self.relative_bias = nn.Parameter(
            torch.empty((2 * window - 1) ** 2, heads, device=device, dtype=dtype)
        )
        nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def bias(self) -> Float[Tensor, "h n n"]:
        """The bias of the logits of a window, by the place of the query minus that of the key."""
        place = torch.arange(self.window, device=self.relative_bias.device)
        step = place[:, None] - place + self.window - 1
        index = step[:, None, :, None] * (2 * self.window - 1) + step[None, :, None, :]
        return self.relative_bias[index.flatten(2).flatten(0, 1)].movedim(-1, 0)

    def attend(
        self, x: Float[Tensor, "b c height width"], query: Float[Tensor, "b h n d"] | None = None
    ) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        batch, _, height, width = x.shape
        side = {"y": self.window, "x": self.window}
        down, right = -height % self.window, -width % self.window
        sides = {"r": (height + down) // self.window, "s": (width + right) // self.window}
        key_mask = None
        if down or right:
            x = F.pad(x, (0, right, 0, down))
            on_map = F.pad(x.new_ones(1, height, width, 1), (0, 0, 0, right, 0, down))
            key_mask = (rearrange(on_map, _WINDOWS, **side)[..., 0] > 0).repeat(batch, 1)
        tokens = rearrange(x.movedim(1, -1), _WINDOWS, **side)
        parts = rearrange(self.qkv(tokens), "g n (three h d) -> three g h n d", h=self.heads, d=self._width)
        key, value = parts[-2:]
        if query is None:
            query = parts[0]
        else:
            query = repeat(query, "b h n d -> (b r s) h n d", **sides)
            query = query.to(key.dtype)  # autocast
        y = attention(query, key, value, bias=self.bias().to(key.dtype), key_mask=key_mask)
        y = self.proj(rearrange(y, "g h n d -> g n (h d)"))
        before, after = _WINDOWS.split(" -> ")
        y = rearrange(y, f"{after} -> {before}", **sides, **side)
        return y[:, :height, :width].movedim(-1, 1)

    @property
    def _width(self) -> int:
        return self.dim // self.heads


@register(
    "gcvit-window",
    kind="grid",
    paper="gcvit",
    tags=("sparse", "local", "window"),
    spatial=(2,),
    complexity="O(N window^2 C)",
)
class GCViTWindowAttention(_WindowMixer):
    """Softmax attention inside windows that do not overlap, with a bias for each relative place.

        y_i = W_o sum_j softmax_j(d^-1/2 q_i . k_j + bias[i - j]) v_j   over the tokens of a window

    A map that the window does not divide is padded (right, bottom) with hidden tokens.

    dim       channels
    heads     divides dim
    window    side of a window in tokens
    qkv_bias  whether the projection of q, k and v has a bias

    Raises ValueError on heads that do not divide dim or a window below 1. Source: GC ViT, arXiv 2206.09959.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "window": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, heads=heads, window=window, qkv_bias=qkv_bias, projections=3, device=device, dtype=dtype
        )

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return self.attend(x)


@register(
    "gcvit-global",
    kind="grid",
    paper="gcvit",
    tags=("sparse", "window", "global"),
    spatial=(2,),
    extra_inputs=("query",),
    complexity="O(N window^2 C)",
)
class GlobalQueryWindowAttention(_WindowMixer):
    """The tokens of every window answer the same queries: a map of window x window that is given.

        y_i = W_o sum_j softmax_j(d^-1/2 q_i . k_j + bias[i - j]) v_j,   i a place of the window, k, v = W x

    A map that the window does not divide is padded (right, bottom) with hidden tokens.

    dim       channels
    heads     divides dim
    window    side of a window in tokens
    qkv_bias  whether the projection of k and v has a bias
    forward:  query (b, dim, window, window), see `GlobalQueryGenerator`

    Raises ValueError on heads that do not divide dim, a window below 1, or a query of another shape.
    Source: GC ViT, arXiv 2206.09959.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "window": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, heads=heads, window=window, qkv_bias=qkv_bias, projections=2, device=device, dtype=dtype
        )

    def example_inputs(self, **how: Any) -> dict[str, Tensor]:
        inputs = super().example_inputs(**how)
        x = inputs["x"]
        generator = torch.Generator().manual_seed(1)
        shape = (len(x), self.dim, self.window, self.window)
        query = torch.randn(shape, generator=generator, dtype=torch.float64)
        return {"x": x, "query": query.to(x.dtype)}

    def forward(
        self, x: Float[Tensor, "b c height width"], *, query: Float[Tensor, "b c window window"]
    ) -> Float[Tensor, "b c height width"]:
        if query.shape != (x.shape[0], self.dim, self.window, self.window):
            raise ValueError(
                f"query has shape {tuple(query.shape)}, must be "
                f"({len(x)}, {self.dim}, {self.window}, {self.window})"
            )
        return self.attend(x, rearrange(query, "b (h d) y x -> b h (y x) d", h=self.heads))


@register(
    "gcvit",
    kind="grid",
    paper="gcvit",
    tags=("sparse", "window", "global"),
    aliases=("global-context-attention",),
    spatial=(2,),
    complexity="O(N window^2 C + N C^2)",
)
class GlobalContextAttention(Mixer):
    """Window attention whose queries are made from the whole map, for use alone.

        y = attention(x, query=generator(x))   of `GlobalQueryWindowAttention` and `GlobalQueryGenerator`

    In the backbone the generator reads the input of the stage and serves all its blocks.

    dim       channels
    heads     divides dim
    window    side of a window in tokens
    pools     times the generator halves the map
    qkv_bias  whether the projection of k and v has a bias

    Raises ValueError on heads that do not divide dim or a window below 1. Source: GC ViT, arXiv 2206.09959.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "window": 3}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 7,
        pools: int = 0,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        self.generator = GlobalQueryGenerator(dim, window=window, pools=pools, device=device, dtype=dtype)
        self.attention = GlobalQueryWindowAttention(
            dim, heads=heads, window=window, qkv_bias=qkv_bias, device=device, dtype=dtype
        )

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, self.entry.spatial)
        return self.attention(x, query=self.generator(x))


class GlobalQueryGenerator(nn.Module):
    """A map of window x window made from the whole map, by blocks that each halve it.

        x = maxpool3x3(x + FusedConv(x)), `pools` times;   x = x + FusedConv(x) once if pools is 0

    A result of another size is averaged to window x window: heedful's extension, for maps of any size.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int,
        pools: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window = window
        self.pools = pools
        self.convs = nn.ModuleList(FusedConv(dim, device=device, dtype=dtype) for _ in range(max(pools, 1)))

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c window window"]:
        for conv in self.convs:
            x = x + conv(x)
            if self.pools:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
        return F.adaptive_avg_pool2d(x, self.window)


class FusedConv(nn.Module):
    """Conv1x1(SE(gelu(DWConv3x3(x)))), without biases; SE(u) = u sigmoid(W_2 gelu(W_1 mean(u)))."""

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        how: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **how)
        self.squeeze = nn.Linear(dim, max(1, dim // 4), **how)
        self.excite = nn.Linear(max(1, dim // 4), dim, **how)
        self.pointwise = nn.Conv2d(dim, dim, 1, **how)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        x = F.gelu(self.depthwise(x))
        gate = self.excite(F.gelu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return self.pointwise(x * gate[:, :, None, None])
