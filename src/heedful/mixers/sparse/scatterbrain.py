"""Scatterbrain: exact attention where it is large, random features everywhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heedful.checks import (
    check_choice,
    check_divides,
    check_mask,
    check_no_context,
    check_positions,
    check_positive,
    check_tokens,
)
from heedful.mixers.mixer import Mixer
from heedful.mixers.state import KVState
from heedful.ops.linear import linear_attention
from heedful.ops.scatterbrain import (
    key_features,
    low_rank_sums,
    orthogonal_projection,
    query_features,
    scatterbrain_attention,
    support_groups,
)
from heedful.patterns.causal import Causal
from heedful.patterns.pattern import Pattern
from heedful.patterns.window import Window
from heedful.registry import register
from heedful.routing.lsh import balanced_hashes, clusters_shared, lsh_clusters


class _Scatterbrain(Mixer):
    """What the two forms share: projections of x, and the random projection of the features."""

    projection: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        features: int | None,
        scaling: int,
        qkv_bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        self.heads, self.head_dim = heads, dim // heads
        if features is None:
            features = max(2, int(self.head_dim * math.log(self.head_dim)))
        if not isinstance(features, int) or features < 2:
            raise ValueError(f"features is {features!r}, must be a whole number of at least 2")
        check_choice("scaling", scaling, (0, 1))
        self.rows, self.scaling, self.scale = features // 2, scaling, self.head_dim**-0.5
        self.query = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.key = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)
        projection = orthogonal_projection(
            self.rows, self.head_dim, scaling=scaling, device=device, dtype=dtype
        )
        self.register_buffer("projection", projection)

    def redraw(self) -> None:
        """Draw what is random anew."""
        self.projection.copy_(
            orthogonal_projection(
                self.rows, self.head_dim, scaling=self.scaling, device=self.projection.device
            )
        )

    def project(
        self, x: Float[Tensor, "b n c"], source: Float[Tensor, "b m c"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Queries of x, keys and values of `source`, by heads."""
        query, key, value = (
            rearrange(y, "b n (h d) -> b h n d", d=self.head_dim)
            for y in (self.query(x), self.key(source), self.value(source))
        )
        return query, key, value


@dataclass(frozen=True)
class ScatterbrainState(KVState):
    """Keys and values that the support may still reach; the low-rank sums of all keys, and their scale."""

    sums: Float[Tensor, "b h f v"] | None = None
    log_scale: Float[Tensor, "b h 1 1"] | None = None


@register(
    "scatterbrain",
    kind="sequence",
    paper="scatterbrain",
    tags=("sparse", "linear", "features", "window"),
    aliases=("scatterbrain-local",),
    causal="optional",
    cross=True,
    decode=True,
    complexity="O(N (W + F) C)",
)
class ScatterbrainLocalAttention(_Scatterbrain):
    """Softmax attention inside a window, and its estimate by random features outside.

        A_ij = exp(q_i . k_j / sqrt(d))   for j - i in [-(w // 2), (w + 1) // 2 - 1]
        A_ij = phi(q_i) . phi(k_j)        elsewhere, whose expectation over projections is the same
        y_i = W_o concat_h sum_j A_ij v_j / sum_j A_ij

    phi are positive features of both signs of a block-orthogonal random projection, which is drawn when the
    mixer is built, kept in the state dict, and drawn anew by `redraw()`.

    dim       channels of x, of the context and of y
    heads     heads, a divisor of `dim`
    window    keys that a query sees exactly, its own among them
    pattern   where attention is exact instead of in a window, such as a block-sparse layout (SBBlockSparse);
              a window costs the same however many tokens there are
    features  random features, an even number; None: d ln d
    scaling   0: projections of random length, unbiased; 1: all of one length
    causal    a token sees itself and what came before, exactly or not; needed to decode
    qkv_bias  biases in W_q, W_k, W_v; W_o always has one

    forward: mask (b, n) hides tokens of x as keys, context_mask (b, m) those of the context, whose token i
    stands at position i and in which `causal` does not act; `positions` has no effect.
    Raises ValueError if heads does not divide dim, and where a state comes with a context.
    Source: Scatterbrain, arXiv 2110.15343.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "window": 5}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 49,
        pattern: Pattern | None = None,
        features: int | None = None,
        scaling: int = 0,
        causal: bool = False,
        qkv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads, features, scaling, qkv_bias, device, dtype)
        check_positive("window", window)
        self.causal = causal
        self.before = window // 2 if pattern is None else None  # how far back the support reaches
        self.support = Window(window // 2, (window + 1) // 2 - 1) if pattern is None else pattern
        self.block = 64 if pattern is not None else max(16, min(128, window))

    def init_state(self, batch: int) -> ScatterbrainState:
        """The state before the first token of `batch` sequences."""
        if not self.causal:
            raise ValueError(
                "causal is False, must be True to decode: later tokens would change earlier ones"
            )
        return ScatterbrainState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: ScatterbrainState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], ScatterbrainState]:
        check_tokens("x", x, self.dim)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        source, seen, causal = x, mask, self.causal
        if context is not None:
            check_tokens("context", context, self.dim)
            check_mask("context_mask", context_mask, context.shape[0], context.shape[1])
            if context.shape[0] != x.shape[0]:
                raise ValueError(f"context has batch {context.shape[0]}, must be {x.shape[0]}, that of x")
            if state is not None:
                raise ValueError("state is given, must be None with a context: it is of self-attention")
            source, seen, causal = context, context_mask, False
        elif context_mask is not None:
            raise ValueError("context_mask is given, must come with a context")
        query, key, value = self.project(x, source)
        if state is not None:
            heads, state = self._continue(query, key, value, seen, state)
        else:
            heads = self.attend(query, key, value, key_mask=seen, causal=causal)
        y = self.out(rearrange(heads, "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h m d"],
        value: Float[Tensor, "b h m e"],
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b h n e"]:
        """The attention itself; query i stands at key i."""
        phi_query, level = query_features(query, self.projection, self.scale)
        phi_key, log_scale = key_features(key, self.projection, self.scale, mask=key_mask)
        low_rank = low_rank_sums(phi_query, phi_key, value, causal=causal)
        support = Causal() & self.support if causal else self.support
        return self._join(
            query, key, value, (phi_query, phi_key, level + log_scale), low_rank, support, key_mask, 0
        )

    def _continue(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, state: ScatterbrainState
    ) -> tuple[Tensor, ScatterbrainState]:
        """The low-rank sums go on from the state; the support looks back at the keys that it keeps."""
        held = 0 if state.key is None else state.key.shape[2]
        phi_query, level = query_features(query, self.projection, self.scale)
        least = state.log_scale
        if least is None:
            least = level.new_full((*level.shape[:2], 1, 1), -torch.inf)
        phi_new, log_scale = key_features(key, self.projection, self.scale, mask=mask, least=least)
        shown = log_scale.masked_fill(log_scale == -torch.inf, 0.0)
        sums = state.sums
        if sums is not None:
            sums = sums * (least - shown).exp()
        values = nn.functional.pad(value.to(phi_new.dtype), (0, 1), value=1.0)
        low_rank, sums = linear_attention(phi_query, phi_new, values, state=sums, return_state=True)

        kv = KVState(held, state.key, state.value, state.mask).append(key, value, mask)
        assert kv.key is not None
        assert kv.value is not None
        # With the scale at hand the features of the keys behind come out as they stand in the sums.
        phi_key, _ = key_features(kv.key, self.projection, self.scale, mask=kv.mask, least=log_scale)
        features = (phi_query, phi_key, level + shown)
        heads = self._join(
            query, kv.key, kv.value, features, low_rank, Causal() & self.support, kv.mask, held
        )
        drop = 0 if self.before is None else max(0, kv.length - self.before)
        rest = None if kv.mask is None else kv.mask[:, drop:]
        length = state.length + query.shape[2]
        return heads, ScatterbrainState(
            length, kv.key[:, :, drop:], kv.value[:, :, drop:], rest, sums, log_scale
        )

    def _join(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        features: tuple[Tensor, Tensor, Tensor],
        low_rank: Tensor,
        pattern: Pattern,
        key_mask: Tensor | None,
        offset: int,
    ) -> Tensor:
        n, m = query.shape[2], key.shape[2]
        if not query.numel() or not m:
            return query.new_zeros(*query.shape[:3], value.shape[-1])
        support = support_groups(pattern, n, m, offset, self.block)
        return scatterbrain_attention(
            query, key, value, features, low_rank, [support], scale=self.scale, key_mask=key_mask
        )


@register(
    "scatterbrain-lsh",
    kind="sequence",
    paper="scatterbrain",
    tags=("sparse", "linear", "features", "hash"),
    aliases=("scatterbrain-smyrf",),
    complexity="O(N (R W + F) C + N log N)",
)
class ScatterbrainLSHAttention(_Scatterbrain):
    """Softmax attention inside clusters of like hash values, and its estimate by random features elsewhere.

    In each round queries and keys stand in the order of a hash that brings large inner products together
    (`balanced_hashes`), and the c-th `cluster_size` queries meet the c-th `cluster_size` keys. A pair that
    meets in several rounds counts once. Weights, features and `redraw()`, which also draws new hashes, are
    those of `ScatterbrainLocalAttention`. Clusters are formed among all tokens, so this form sees the future.

    dim           channels
    heads         heads, a divisor of `dim`
    cluster_size  queries, and keys, of a cluster
    rounds        hashes
    features      random features, an even number; None: d ln d
    scaling       0: projections of random length, unbiased; 1: all of one length
    qkv_bias      biases in W_q, W_k, W_v; W_o always has one

    forward: mask (b, n) hides tokens, which come last in every round; `positions` has no effect.
    Raises ValueError if heads does not divide dim, and for a context or a state.
    Source: Scatterbrain, arXiv 2110.15343 (SBSmyrf); the clusters, SMYRF, arXiv 2010.05315.
    """

    example: ClassVar[dict[str, Any]] = {"dim": 16, "heads": 4, "cluster_size": 4}
    directions: Tensor
    shifts: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        cluster_size: int = 24,
        rounds: int = 2,
        features: int | None = None,
        scaling: int = 0,
        qkv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads, features, scaling, qkv_bias, device, dtype)
        check_positive("cluster_size", cluster_size)
        check_positive("rounds", rounds)
        self.cluster_size, self.rounds = cluster_size, rounds
        self.register_buffer("directions", torch.randn(self.head_dim + 2, rounds, device=device, dtype=dtype))
        self.register_buffer("shifts", torch.rand(rounds, device=device, dtype=dtype))

    def redraw(self) -> None:
        """Draw the features' projection and the hashes anew."""
        super().redraw()
        self.directions.normal_()
        self.shifts.uniform_()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: None = None,
    ) -> Float[Tensor, "b n c"]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None:
            raise ValueError("state is given, must be None: clusters are formed among all tokens")
        query, key, value = self.project(x, x)
        hashes = balanced_hashes(query, key, self.directions, self.shifts, query_mask=mask, key_mask=mask)
        orders = [h.sort(dim=-1, stable=True).indices for h in hashes]
        heads = self.attend(query, key, value, orders[0], orders[1], key_mask=mask)
        return self.out(rearrange(heads, "b h n d -> b n (h d)"))

    def attend(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n e"],
        query_orders: Shaped[Tensor, "r b h n"],
        key_orders: Shaped[Tensor, "r b h n"],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b h n e"]:
        """The attention itself, for token numbers in the order of their hashes, round by round.

        causal: a query sees no key behind it, though the clusters were formed among all.
        """
        if not query.numel():
            return torch.zeros_like(value)
        phi_query, level = query_features(query, self.projection, self.scale)
        phi_key, log_scale = key_features(key, self.projection, self.scale, mask=key_mask)
        low_rank = low_rank_sums(phi_query, phi_key, value, causal=causal)
        size = self.cluster_size
        supports = [
            lsh_clusters(q, k, query_cluster_size=size, key_cluster_size=size, causal=causal)
            for q, k in zip(query_orders, key_orders, strict=True)
        ]
        of_query, of_key = clusters_shared(
            query_orders, key_orders, query_cluster_size=size, key_cluster_size=size
        )

        def rounds_together(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return (of_query[:, b, h, row] == of_key[:, b, h, column]).sum(0)

        return scatterbrain_attention(
            query,
            key,
            value,
            (phi_query, phi_key, level + log_scale),
            low_rank,
            supports,
            scale=self.scale,
            key_mask=key_mask,
            sharing=rounds_together,
        )
