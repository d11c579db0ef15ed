"""Weights of multi-head latent attention from those of multi-head or grouped-query attention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from heedful.checks import check_divides, check_positive


def truncated_svd(
    weight: Float[Tensor, "o i"], *, rank: int | None = None, energy: float | None = None, multiple: int = 8
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]:
    """The best factors of a matrix: weight ~ up @ down, with up = U_r and down = diag(s_r) V_r^T.

        rank = max(1, number of k with sum_{i<=k} s_i^2 / sum_i s_i^2 <= energy)

    rank      columns of `up`; None: as many as `energy` asks for. Exactly one of the two is given
    energy    share of the squared singular values, between 0 and 1, that may be kept before rounding
    multiple  the rank is rounded up to a multiple of it, at most the smaller side of `weight`

    The squared error is the sum of the dropped s_i^2. Raises ValueError unless exactly one of rank and energy
    is given.
    Source: X-EcoMLA, arXiv 2503.11132.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank is {rank} and energy is {energy}, exactly one of them must be given")
    check_positive("multiple", multiple)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy is {energy}, must be above 0 and at most 1")
        share = s.square().cumsum(0) / s.square().sum()
        rank = max(1, int((share <= energy).sum()))
    assert rank is not None
    check_positive("rank", rank)
    rank = min(-(-rank // multiple) * multiple, len(s))
    return u[:, :rank], s[:rank, None] * vt[:rank]


def mla_from_attention(
    query: Float[Tensor, "hd c"],
    key: Float[Tensor, "gd c"],
    value: Float[Tensor, "gd c"],
    out: Float[Tensor, "c hd"],
    *,
    heads: int,
    kv_heads: int,
    nope_dim: int,
    rope_dim: int,
    query_rank: int | None = None,
    kv_rank: int | None = None,
    query_energy: float | None = None,
    kv_energy: float | None = None,
    multiple: int = 8,
) -> dict[str, Float[Tensor, "..."]]:
    """The state dictionary of a `MultiHeadLatentAttention(latent_norm=False)` near a given attention.

        W_qb W_qa ~ W_q,  W_kvb W_kva ~ [W_k; W_v] (heads repeated),  by truncated singular values

    Of each head d channels wide, W_qb keeps the first d_n and the last d_r rows, the key half of W_kvb the
    first d_n; values keep all d. The rotary key is the mean over the KV heads of their last d_r rows.

    query, key, value, out  weights as nn.Linear has them; channels of a head stand side by side
    heads, kv_heads         of the given attention; the result has `heads` heads throughout
    nope_dim, rope_dim      d_n and d_r, each at most d; d_n + d_r = d keeps the query whole
    query_rank, kv_rank     ranks of the two factorisations, or
    query_energy, kv_energy what decides them (see `truncated_svd`)
    multiple                ranks are rounded up to it

    The ranks are the lengths of `query_down.weight` and `kv_up.weight`'s rows. Old and new rotary embeddings
    differ, and one key stands for many, so that what is made is a start for distillation; with rope_dim 0
    and full ranks it equals the given attention without positions.
    Raises ValueError if heads do not divide or the dims do not fit. Source: X-EcoMLA, arXiv 2503.11132.
    """
    check_divides("kv_heads", kv_heads, "heads", heads)
    check_divides("heads", heads, "the rows of query", len(query))
    d = len(query) // heads
    for name, matrix in (("key", key), ("value", value)):
        if len(matrix) != kv_heads * d:
            raise ValueError(f"{name} has {len(matrix)} rows, must be kv_heads times {d}, {kv_heads * d}")
    if not 0 <= nope_dim <= d or not 0 <= rope_dim <= d or nope_dim + rope_dim == 0:
        raise ValueError(
            f"nope_dim is {nope_dim} and rope_dim is {rope_dim}, must be at most {d}, the old head's, "
            "and not both 0"
        )
    # 1. Queries.
    up, down = truncated_svd(query, rank=query_rank, energy=query_energy, multiple=multiple)
    per_head = up.unflatten(0, (heads, d))
    query_up = torch.cat([per_head[:, :nope_dim], per_head[:, d - rope_dim :]], dim=1)
    # 2. Keys and values together, as every head reads them.
    key_heads, value_heads = key.unflatten(0, (kv_heads, d)), value.unflatten(0, (kv_heads, d))
    repeated = [w.repeat_interleave(heads // kv_heads, dim=0) for w in (key_heads, value_heads)]
    both = torch.stack(repeated).flatten(0, 2)
    kv_up, kv_down = truncated_svd(both, rank=kv_rank, energy=kv_energy, multiple=multiple)
    key_up, value_up = kv_up.unflatten(0, (2, heads, d))
    # 3. The rotary key.
    shared = key_heads[:, d - rope_dim :].mean(0)
    return {
        "query_down.weight": down,
        "query_up.weight": query_up.flatten(0, 1).contiguous(),
        "kv_down.weight": torch.cat([kv_down, shared]),
        "kv_up.weight": torch.cat([key_up[:, :nope_dim], value_up], dim=1).flatten(0, 1),
        "out.weight": out,
    }
