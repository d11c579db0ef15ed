"""Routing attention of the PyTorch port: raw logits, masks by position, memories beside every cluster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_mask, check_positive
from heedful.ops.attention import attention
from heedful.routing.clusters import closest_tokens, mean_weight, nearest_cluster
from heedful.selection import TokenGroups


class KmeansAttention(nn.Module):
    """Attention in clusters as in the PyTorch port, on queries, keys and values that are split into heads.

        cluster c:  its `window` nearest queries see its `window` nearest keys, both by unit vectors
        o_ic = softmax(q_i [memories_c, K_c]^T / sqrt(d)) [memories_c, V_c],   o_i = mean over c, 0 if none

    It differs from `RoutingTransformerAttention(selection="paper")`: logits are of the raw queries and keys,
    scaled by d ** -0.5 (with `shared_qk` the key is the query at unit length); each cluster has learned
    memory keys and values; the mean has count + 1e-5 below it; masked tokens take places in clusters and are
    hidden afterwards. The choice sees the whole sequence.

    heads, head_dim  of the tensors that forward takes
    clusters         centroids a head, at unit length; they stay as loaded
    window           queries and keys that a cluster takes
    causal           a query sees no key behind it
    shared_qk        the key is the query; a query then sees itself only where it sees nothing else
    memories         learned keys and values of each cluster, at least 1 with `causal` unless `shared_qk`

    forward(query, key, value, mask=None), all (b, h, n, d), gives (b, h, n, d); `aux_loss` is then 1e-4 *
    the mean squared distance of queries and keys, at unit length, to their centroids.
    Raises ValueError where memories are too few.
    Source: lucidrains/routing-transformer, of arXiv 2003.05997.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        clusters: int,
        window: int,
        causal: bool = False,
        shared_qk: bool = False,
        memories: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("window", window)
        least = 1 if causal and not shared_qk else 0
        if memories < least:
            raise ValueError(f"memories is {memories}, must be at least {least}, so that no query is blind")
        self.window, self.causal, self.shared_qk, self.memories = window, causal, shared_qk, memories
        self.means: Tensor
        means = torch.randn(heads, clusters, head_dim, device=device, dtype=dtype)
        self.register_buffer("means", F.normalize(means, dim=-1))
        shape = (heads, clusters, memories, head_dim)
        self.memory_key = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
        self.memory_value = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
        self.aux_loss: Tensor | None = None

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n d"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h n d"]:
        b, h, n, d = query.shape
        check_mask("mask", mask, b, n)
        # 1. Clusters and the loss, by unit vectors.
        units = [F.normalize(t, dim=-1) for t in (query, key)]
        tokens = torch.cat(units, dim=2)
        head = torch.arange(h, device=query.device)[:, None]
        self.aux_loss = 1e-4 * F.mse_loss(tokens, self.means[head, nearest_cluster(tokens, self.means)])
        rows, columns = (closest_tokens(t, self.means, self.window) for t in units)

        # 2. What clusters see beside tokens stands behind them: place n + j of a head is extra j.
        k = self.means.shape[1]
        if self.shared_qk:
            key = units[1]
        keys = torch.cat([key, self.memory_key.flatten(1, 2).expand(b, -1, -1, -1)], dim=2)
        values = torch.cat([value, self.memory_value.flatten(1, 2).expand(b, -1, -1, -1)], dim=2)
        extra = n + torch.arange(k * self.memories, device=query.device).view(k, -1)
        extra = extra.expand(b, h, -1, -1)
        alone = None
        if self.shared_qk and self.causal and not self.memories:
            # The first token of a cluster sees nothing before it, so it gets a copy of itself.
            alone = rows[..., 0]
            where = alone[..., None].expand(-1, -1, -1, d)
            keys, values = (torch.cat([t, t.gather(2, where)], dim=2) for t in (keys, values))
            extra = (n + torch.arange(k, device=query.device)).view(k, 1).expand(b, h, -1, -1)

        # 3. One softmax a cluster, and the mean over the clusters that took a query.
        m = keys.shape[2]

        def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            own = column >= n
            if alone is not None:
                own = own & (alone[b, h, (column - n).clamp(min=0)] == row)
            tokens = column < n
            if self.shared_qk:
                tokens = tokens & (column != row)
            if self.causal:
                tokens = tokens & (column <= row)
            if mask is not None:
                at = column.clamp(max=n - 1)
                tokens = tokens & mask[b, row] & mask[b, at]
            return own | tokens

        weight = mean_weight(rows, n, 1e-5, query.dtype)
        sees = TokenGroups(rows, torch.cat([extra, columns], -1), (n, m), visible, query_weight=weight)
        return attention(query, keys, values, pattern=sees)
