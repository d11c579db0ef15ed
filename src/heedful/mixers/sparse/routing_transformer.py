"""Routing attention: heads whose tokens meet in learned clusters, beside heads that look nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
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
from heedful.ops.attention import attention
from heedful.patterns.causal import Causal
from heedful.patterns.halo import Halo
from heedful.patterns.pattern import Pattern
from heedful.registry import register
from heedful.routing.clusters import (
    centroid_scores,
    closest_tokens,
    cluster_nearest,
    cluster_topk,
    mean_weight,
    nearest_cluster,
)

SELECTIONS = ("strict", "paper")
_COUNT_EPS = 1e-2  # in the mean over the clusters that took a token
_EMA_EPS = 1e-5  # of Laplace's smoothing of the cluster sizes


@dataclass(frozen=True)
class RoutingState(KVState):
    """Keys and values of all heads, and how near every key of a routed head is to each centroid."""

    score: Float[Tensor, "b hr k m"] | None = None


@register(
    "routing-transformer",
    kind="sequence",
    paper="routing-transformer",
    tags=("sparse", "softmax", "cluster", "routing"),
    aliases=("routing-attention",),
    causal="optional",
    decode=True,
    complexity="O(N W C + N K C)",
)
class RoutingTransformerAttention(Mixer):
    """Softmax attention among tokens of one cluster, in some heads, and over near blocks, in the others.

        routed head:  q, k = norm(x W_q), norm(x W_k);  c = argmax_c q_i . mu_c
                      o_i = softmax(q_i K_S^T) V_S,  S the `window` keys up to i with the largest k . mu_c
        local head:   o_i = softmax(q_i K^T / sqrt(d)) V over the own block up to i and the block before it
        y = concat_h(o_h T) W_o

    norm is a layer norm over the head without scale and shift, so that routed logits need no scale; T is one
    matrix d x d for all heads; no projection has a bias.

    The centroids mu follow an online k-means: every backward pass in training moves them towards the mean of
    the tokens they are nearest to (queries, then keys), with the decay `decay`; a forward never changes them,
    so what a token sees depends on nothing after it. aux_losses["clusters"] = beta * the mean squared
    distance of queries and of keys to their centroids, whose gradient draws the tokens in.

    dim          channels
    heads        heads, a divisor of `dim`; routed heads come first
    local_heads  how many of them are local; None: half
    clusters     centroids a routed head; the authors take about sqrt(N)
    window       keys that a query of a routed head sees, about N / clusters
    local_block  tokens of a block of the local heads
    shared_qk    k = q in routed heads, as the authors have it in their model of WikiText
    causal       hide the future; needed to decode
    selection    "strict": as above. "paper": each centroid takes the `window` nearest queries and, apart from
                 them, keys of the whole sequence (`cluster_topk`), so that the choice sees the future even
                 where `causal` hides it from the attention; the attribute `causal` is then False, and the
                 mixer does not decode. None: "strict" with `causal`, else "paper"
    rank_causal  with "paper", the authors' mask: the r-th query of a cluster sees its first r keys. It leaks
                 unless `shared_qk`. False: positions are compared
    ema          True: as above. False: the centroids are parameters, and the loss moves them
    decay, beta  of the centroids' running means, and of the auxiliary loss

    forward: mask (b, n) hides tokens, which then take no place in a cluster; `positions` has no effect.
    Raises ValueError if heads does not divide dim, for "strict" without `causal`, and for a context.
    Source: Routing Transformer, arXiv 2003.05997.
    """

    example: ClassVar[dict[str, Any]] = {
        "dim": 16,
        "heads": 4,
        "clusters": 3,
        "window": 4,
        "local_block": 3,
    }
    means: Tensor
    ema_count: Tensor
    ema_means: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        local_heads: int | None = None,
        clusters: int = 16,
        window: int = 512,
        local_block: int = 256,
        shared_qk: bool = False,
        causal: bool = True,
        selection: str | None = None,
        rank_causal: bool = False,
        ema: bool = True,
        decay: float = 0.99,
        beta: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides("heads", heads, "dim", dim)
        local_heads = heads // 2 if local_heads is None else local_heads
        if not 0 <= local_heads < heads:
            raise ValueError(f"local_heads is {local_heads}, must be from 0 to {heads - 1} (heads - 1)")
        for name, value in (("clusters", clusters), ("window", window), ("local_block", local_block)):
            check_positive(name, value)
        if selection is None:
            selection = "strict" if causal else "paper"
        check_choice("selection", selection, SELECTIONS)
        if selection == "strict" and not causal:
            raise ValueError("selection is 'strict', must be 'paper' with causal=False")
        if rank_causal and not (causal and selection == "paper"):
            raise ValueError("rank_causal is True, must be False unless causal=True and selection='paper'")
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, must be at least 0 and less than 1")
        self.heads, self.head_dim = heads, dim // heads
        self.local_heads, self.routed_heads = local_heads, heads - local_heads
        self.clusters, self.window, self.local_block = clusters, window, local_block
        self.shared_qk, self.selection, self.rank_causal = shared_qk, selection, rank_causal
        self.hide_future = causal
        self.causal = causal and selection == "strict"
        self.ema, self.decay, self.beta = ema, decay, beta

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        key_heads = local_heads if shared_qk else heads
        self.query = linear(dim, dim)
        self.key = linear(dim, key_heads * self.head_dim) if key_heads else None
        self.value = linear(dim, dim)
        self.talk = linear(self.head_dim, self.head_dim)
        self.out = linear(dim, dim)
        means = self.norm(torch.randn(self.routed_heads, clusters, self.head_dim, device=device, dtype=dtype))
        if ema:
            self.register_buffer("means", means)
            # A size of 1 makes the running means start at the centroids.
            self.register_buffer("ema_count", torch.ones_like(means[..., 0]))
            self.register_buffer("ema_means", means.clone())
        else:
            self.means = nn.Parameter(means)

    def init_state(self, batch: int) -> RoutingState:
        """The state before the first token of `batch` sequences."""
        if not self.hide_future:
            raise ValueError("causal is False, must be True to decode: later tokens change earlier ones")
        if not self.causal:
            raise ValueError("selection is 'paper', must be 'strict' to decode: clusters choose among all")
        return RoutingState()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        positions: Shaped[Tensor, "*rows n"] | None = None,
        state: RoutingState | None = None,
    ) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], RoutingState]:
        check_tokens("x", x, self.dim)
        check_no_context(context, context_mask)
        check_mask("mask", mask, x.shape[0], x.shape[1])
        check_positions("positions", positions, x.shape[0], x.shape[1])
        if state is not None and not self.causal:
            raise ValueError("state is given, must be None: this instance does not decode")
        routed = self.routed_heads

        query, key, value = self.project(x)
        query_cluster = nearest_cluster(query[:, :routed], self.means)
        score = centroid_scores(key[:, :routed], self.means)
        self._learn(query, key, query_cluster, score.argmax(2), mask)
        seen = mask
        if state is not None:
            old, kv = state, state.append(key, value, mask)
            if old.score is not None:
                score = torch.cat([old.score, score], dim=3)
            state = RoutingState(kv.length, kv.key, kv.value, kv.mask, score)
            assert kv.key is not None
            assert kv.value is not None
            key, value, seen = kv.key, kv.value, kv.mask

        if self.selection == "strict":
            sees = cluster_nearest(query_cluster, score, window=self.window, key_mask=seen)
            heads = attention(
                query[:, :routed], key[:, :routed], value[:, :routed], pattern=sees, scale=1.0, key_mask=seen
            )
        else:
            heads = self._whole_sequence(query[:, :routed], key[:, :routed], value[:, :routed], mask)
        if self.local_heads:
            near: Pattern = Halo(max(1, key.shape[2]), self.local_block, self.local_block)
            near = Causal() & near if self.hide_future else near
            local = attention(
                query[:, routed:],
                key[:, routed:],
                value[:, routed:],
                pattern=near if key.shape[2] else None,
                scale=1.0,
                key_mask=seen,
            )
            heads = torch.cat([heads, local], dim=1)
        y = self.out(rearrange(self.talk(heads), "b h n d -> b n (h d)"))
        return y if state is None else (y, state)

    def project(
        self, x: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Scaled queries, keys and values of all heads; queries and keys of routed heads are normalised."""
        routed = self.routed_heads
        query = rearrange(self.query(x), "b n (h d) -> b h n d", d=self.head_dim) * self.head_dim**-0.5
        value = rearrange(self.value(x), "b n (h d) -> b h n d", d=self.head_dim)
        query = torch.cat([self.norm(query[:, :routed]), query[:, routed:]], dim=1)
        if self.key is None:
            return query, query, value
        key = rearrange(self.key(x), "b n (h d) -> b h n d", d=self.head_dim)
        if self.shared_qk:
            return query, torch.cat([query[:, :routed], key], dim=1), value
        return query, torch.cat([self.norm(key[:, :routed]), key[:, routed:]], dim=1), value

    @staticmethod
    def norm(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Layer norm without scale and shift: every vector gets the squared length d."""
        return F.layer_norm(x, x.shape[-1:], eps=1e-6).to(x.dtype)

    def _whole_sequence(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The published form: centroids choose among all tokens."""
        if not self.rank_causal:
            sees = cluster_topk(
                query,
                key,
                self.means,
                window=self.window,
                causal=self.hide_future,
                query_mask=mask,
                key_mask=mask,
                eps=_COUNT_EPS,
            )
            return attention(query, key, value, pattern=sees, scale=1.0)
        # Every cluster is a short sequence of its own, in which plain causal attention compares ranks. Pads
        # stand at its end, behind all that a query sees.
        n = query.shape[2]
        rows = closest_tokens(query, self.means, self.window, mask=mask)
        columns = closest_tokens(key, self.means, self.window, mask=mask)
        groups = [_taken(query, rows), _taken(key, columns), _taken(value, columns)]
        outs = attention(*(g.flatten(1, 2) for g in groups), pattern=Causal(), scale=1.0)
        outs = outs.unflatten(1, rows.shape[1:3]) * mean_weight(rows, n, _COUNT_EPS, outs.dtype)[..., None]
        outs = outs.masked_fill((rows < 0)[..., None], 0).flatten(2, 3)
        where = rows.clamp(min=0).flatten(2)[..., None].expand_as(outs)
        return torch.zeros_like(value).scatter_add(2, where, outs)

    def _learn(
        self, query: Tensor, key: Tensor, query_cluster: Tensor, key_cluster: Tensor, mask: Tensor | None
    ) -> None:
        """The auxiliary loss; and, in training, the centroids' step once the backward pass comes by."""
        pairs = [(t[:, : self.routed_heads], c) for t, c in ((query, query_cluster), (key, key_cluster))]
        self.aux_losses = {
            "clusters": sum((self._distance(t, c, mask) for t, c in pairs), query.new_zeros(()))
        }
        if self.training and self.ema and query.requires_grad:
            # Not now: a forward that is computed again, for activation checkpointing, must see the same
            # centroids, and is itself never gone back through.
            pairs = [(t.detach(), c) for t, c in pairs]
            query.register_hook(lambda grad: self._move_centroids(pairs, mask))

    def _distance(self, tokens: Tensor, cluster: Tensor, mask: Tensor | None) -> Tensor:
        """beta * mean |t - stop(mu)|^2 and, where mu is a parameter, the mean of |stop(t) - mu|^2."""
        heads = torch.arange(self.routed_heads, device=tokens.device)[:, None]
        wide = torch.promote_types(tokens.dtype, torch.float32)
        tokens, mu = tokens.to(wide), self.means[heads, cluster].to(wide)
        weight = torch.ones_like(tokens[..., :1]) if mask is None else mask[:, None, :, None].to(wide)
        weight = weight.expand(-1, tokens.shape[1], -1, tokens.shape[3])
        weight = weight / weight.sum().clamp(min=1)
        loss = self.beta * ((tokens - mu.detach()).square() * weight).sum()
        return loss if self.ema else loss + ((tokens.detach() - mu).square() * weight).sum()

    @torch.no_grad()
    def _move_centroids(self, pairs: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> None:
        """ema <- decay * ema + (1 - decay) * sums; mu = ema of the sums / smoothed ema of the sizes."""
        for tokens, cluster in pairs:
            size = torch.zeros_like(self.ema_count)
            total = torch.zeros_like(self.ema_means)
            tokens, cluster = (
                rearrange(tokens, "b h n d -> h (b n) d"),
                rearrange(cluster, "b h n -> h (b n)"),
            )
            weight = torch.ones_like(tokens[..., 0])
            if mask is not None:
                weight = weight * mask.flatten()
            size.scatter_add_(1, cluster, weight.to(size.dtype))
            where = cluster[..., None].expand_as(tokens)
            total.scatter_add_(1, where, (tokens * weight[..., None]).to(total.dtype))
            self.ema_count.lerp_(size, 1 - self.decay)
            self.ema_means.lerp_(total, 1 - self.decay)
            whole = self.ema_count.sum(-1, keepdim=True)
            smoothed = (self.ema_count + _EMA_EPS) / (whole + self.clusters * _EMA_EPS) * whole
            self.means.copy_(self.ema_means / smoothed[..., None])


def _taken(x: Float[Tensor, "b h n d"], index: Int[Tensor, "b h k w"]) -> Float[Tensor, "b h k w d"]:
    """The tokens of each cluster; token 0 for pads."""
    where = index.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, where).unflatten(2, index.shape[2:])
