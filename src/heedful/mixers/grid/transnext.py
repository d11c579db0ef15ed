"""TransNeXt's attentions: of a place over its neighbours and a pooled map, and of a whole map."""

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
from heedful.ops.foveal import foveal_attention, inside, log_spaced_offsets
from heedful.registry import register


class CosineHeads(Mixer):
    """What both have: scaled cosine queries, positions by a small network, a projection of all heads."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        trained_size: tuple[int, int] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads, self.head_dim = heads, dim // heads
        self.trained_size = trained_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        start = math.log(math.expm1(1 / 0.24))  # softplus of it is 1 / 0.24
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), start, **factory))
        self.query_embedding = nn.Parameter(torch.zeros(heads, 1, self.head_dim, **factory))
        self.position_in = nn.Linear(2, 512, **factory)
        self.position_out = nn.Linear(512, heads, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def reset_parameters(self) -> None:
        """The start of the authors' models: small normal weights, biases of zero."""
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        check_map("x", x, self.dim, (2,))
        size = (x.shape[2], x.shape[3])
        tokens = rearrange(x, "b c height width -> b (height width) c")
        heads = self.weigh(tokens, self.attend(tokens, size))
        return self.proj(rearrange(heads, "b h n d -> b n (h d)")).mT.unflatten(2, size)

    def attend(self, tokens: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b h n d"]:
        """What the heads give."""
        raise NotImplementedError

    def weigh(
        self, tokens: Float[Tensor, "b n c"], heads: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n d"]:
        """What goes into the projection: all heads as they are; with gates in what is derived from this."""
        return heads

    def scaled(
        self, query: Float[Tensor, "b h n d"], seen: float | Float[Tensor, "n 1"]
    ) -> Float[Tensor, "b h n d"]:
        """(q + E) softplus(tau) seen, with the logarithm of how many keys a query sees."""
        query = query + self.query_embedding.to(query.dtype)
        return (query * F.softplus(self.temperature) * seen).to(query.dtype)

    def position_bias(self, size: tuple[int, int], pooled: tuple[int, int]) -> Float[Tensor, "h n p"]:
        """The logit that a head adds for each offset between a place and a cell."""
        table, index = log_spaced_offsets(
            size,
            pooled,
            trained=self.trained_size,
            device=self.position_in.weight.device,
            dtype=self.position_in.weight.dtype,
        )
        return self.position_out(F.relu(self.position_in(table)))[index].permute(2, 0, 1)


@register(
    "transnext-global",
    kind="grid",
    paper="transnext",
    tags=("softmax", "cosine"),
    spatial=(2,),
    complexity="O(N^2 C)",
)
class GlobalCosineAttention(CosineHeads):
    """Cosine attention over a whole map, with an embedding beside the query and log-spaced positions.

        s = (q / |q| + E_h) . k / |k| softplus(tau_h) log(N) + bias_h(offset)
        y = concat_h(softmax(s_h) v_h) W_o

    The last stage of TransNeXt. bias is a network of two layers on log-spaced offsets (`log_spaced_offsets`).

    dim           channels
    heads         divides dim
    trained_size  height and width that offsets are measured in; None: those of each map
    qkv_bias      whether the projection of queries, keys and values has a bias

    Raises ValueError if heads do not divide. Source: TransNeXt, arXiv 2311.17132.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 12, "heads": 4}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        trained_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, trained_size=trained_size, device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.reset_parameters()

    def attend(self, tokens: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b h n d"]:
        query, key, value = rearrange(
            self.qkv(tokens), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        query = self.scaled(F.normalize(query, dim=-1).to(value.dtype), math.log(size[0] * size[1]))
        key = F.normalize(key, dim=-1).to(value.dtype)
        bias = self.position_bias(size, size).to(value.dtype)
        return attention(query, key, value, bias=bias, scale=1.0)


@register(
    "transnext",
    kind="grid",
    paper="transnext",
    tags=("softmax", "cosine", "local", "pooled"),
    aliases=("aggregated-attention",),
    spatial=(2,),
    complexity="O(N (w^2 + N / r^2) C)",
)
class AggregatedAttention(CosineHeads):
    """Cosine attention of each place over its neighbours and a pooled map, in one softmax.

        x' = LN(pool(gelu(x W_sr))),  s as in `GlobalCosineAttention`, log of the number of keys seen
        o_h = sum_j (a_hj + (q / |q|) T_hj + b_hj) v_hj + sum_p a_hp v'_hp,  a: one softmax over both
        y = concat_h(o_h) W_o

    The first stages of TransNeXt. j runs over a window, p over the pooled map, whose keys and values come
    from the same projections. T and b weigh the neighbours beside the softmax; logits of neighbours have a
    bias for each place of the window, those of pooled cells one by their offset.

    dim           channels
    heads         divides dim
    window        side of the window, an odd number
    pool_ratio    places that a cell of the pooled map joins along a side; a map is at least one cell
    trained_size  height and width that offsets are measured in; None: those of each map
    qkv_bias      whether the projections of queries, keys and values have a bias

    Raises ValueError if heads do not divide or window is even. Source: TransNeXt, arXiv 2311.17132.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 18, "heads": 6}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 3,
        pool_ratio: int = 2,
        trained_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, trained_size=trained_size, device=device, dtype=dtype)
        check_positive("pool_ratio", pool_ratio)
        check_positive("window", window)
        if window % 2 == 0:
            raise ValueError(f"window is {window}, must be odd")
        self.window, self.pool_ratio = window, pool_ratio
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        places = window * window
        self.local_bias = nn.Parameter(torch.zeros(heads, places, **factory))
        self.tokens = nn.Parameter(torch.zeros(heads, self.head_dim, places, **factory))
        self.token_bias = nn.Parameter(torch.zeros(heads, 1, places, **factory))
        self.query = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.reduce = nn.Linear(dim, dim, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.tokens, std=0.02)
        nn.init.trunc_normal_(self.local_bias, std=0.0004)
        # W_sr is a convolution of one place to the authors, and starts as their convolutions do.
        nn.init.normal_(self.reduce.weight, std=(2 / self.dim) ** 0.5)

    def attend(self, tokens: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b h n d"]:
        # 1. Normalised queries; 2. keys and values of the places.
        query = rearrange(self.query(tokens), "b n (h d) -> b h n d", h=self.heads)
        query = F.normalize(query, dim=-1).to(query.dtype)
        key, value = self._keys_values(tokens)
        # 4. Keys and values of the pooled map.
        pooled_size = (max(1, size[0] // self.pool_ratio), max(1, size[1] // self.pool_ratio))
        coarse = F.gelu(self.reduce(tokens)).mT.unflatten(2, size)
        coarse = F.adaptive_avg_pool2d(coarse, pooled_size).flatten(2).mT
        coarse = self.norm(coarse.to(self.norm.weight.dtype)).to(coarse.dtype)  # half under autocast
        pooled_key, pooled_value = self._keys_values(coarse)
        # 3., 5. to 7. One softmax over both, and the weights beside it.
        seen = inside(size, self.window, tokens.device).sum(1, keepdim=True) + coarse.shape[1]
        return foveal_attention(
            self.scaled(query, seen.to(self.temperature.dtype).log()),
            key,
            value,
            pooled_key,
            pooled_value,
            size=size,
            window=self.window,
            local_bias=self.local_bias,
            pooled_bias=self.position_bias(size, pooled_size),
            extra=query @ self.tokens.to(query.dtype) + self.token_bias.to(query.dtype),
        )

    def _keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        key, value = rearrange(self.kv(tokens), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        return F.normalize(key, dim=-1).to(value.dtype), value
