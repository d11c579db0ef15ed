"""Connectivity predicted at low rank: which keys each token of an image will need."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful.checks import check_mask, check_positive
from heedful.registry import register
from heedful.selection import TokenGroups


@register(
    "connectivity-predictor",
    kind="routing",
    paper="sparsifiner",
    tags=("sparse", "image", "predictor"),
    complexity="O(N^2 R), coefficients of rank R",
)
class ConnectivityPredictor(nn.Module):
    """Keeps the keys with the largest estimated attention, for each token and head; the class token sees all.

        c = softmax(scale (q W_q + b_q) ((k W_k + b_k)^T P)),  the `coefficients` largest kept, the others 0
        score = c B^T,  B = |P'| where above `basis_threshold`, else 0

    P, P' (tokens, rank) belong to places, class token first; for maps of another size than the declared one
    they are interpolated. The choice passes no gradient: the predictor is trained with `reconstruction`.

    head_dim         channels of a head of the queries and keys
    tokens           with the class token
    heads            their number decides the default of `scale`, heads ** -0.5 as in the authors' code
    keep_rate        share of the keys that a token keeps, rounded up
    reduce_tokens    rank = tokens // reduce_tokens;  reduce_dim: channels = head_dim // reduce_dim
    coefficients     kept of each row of c
    basis_threshold  entries of the basis up to it are 0
    predictor_scale  the scale; the paper writes head_dim ** -0.5

    Raises ValueError if the rank or the channels would be 0, or the coefficients more than the rank.
    Source: Sparsifiner, arXiv 2303.13755.
    """

    def __init__(
        self,
        head_dim: int,
        tokens: int,
        *,
        heads: int,
        keep_rate: float = 0.25,
        reduce_tokens: int = 6,
        reduce_dim: int = 2,
        coefficients: int = 8,
        basis_threshold: float = 0.02,
        predictor_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("head_dim", head_dim), ("tokens", tokens), ("heads", heads)):
            check_positive(name, value)
        rank, width = tokens // reduce_tokens, head_dim // reduce_dim
        if rank < 1 or width < 1:
            raise ValueError(
                f"reduce_tokens is {reduce_tokens} and reduce_dim {reduce_dim}, must be at most tokens, "
                f"{tokens}, and head_dim, {head_dim}"
            )
        check_positive("coefficients", coefficients)
        if coefficients > rank:
            raise ValueError(f"coefficients is {coefficients}, must be at most the rank, {rank}")
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate is {keep_rate}, must lie in (0, 1]")
        self.tokens, self.coefficients, self.basis_threshold = tokens, coefficients, basis_threshold
        self.keep_rate = keep_rate
        self.scale = heads**-0.5 if predictor_scale is None else predictor_scale
        self.query = nn.Linear(head_dim, width, device=device, dtype=dtype)
        self.key = nn.Linear(head_dim, width, device=device, dtype=dtype)
        self.reduce = nn.Parameter(torch.empty(tokens, rank, device=device, dtype=dtype))
        self.expand = nn.Parameter(torch.empty(tokens, rank, device=device, dtype=dtype))
        for weight in (self.query.weight, self.key.weight, self.reduce, self.expand):
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in (self.query, self.key):
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        *,
        active: Bool[Tensor, "b patches"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> TokenGroups:
        """The selection for `heedful.attention`.

        active  patches that may be picked, not pruned
        size    height and width of the map of patches, to which P and P' of a square map are interpolated;
                None: as many tokens as declared
        """
        scores, _ = self.scores(query.detach(), key.detach(), active=active, size=size)
        return self.groups(self.pick(scores, active))

    def budget(self, tokens: int) -> int:
        """Keys that each token keeps."""
        return math.ceil(self.keep_rate * tokens)

    def coefficient_rows(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        active: Bool[Tensor, "b patches"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b h patches r"]:
        """c of every patch, before the small ones are dropped."""
        tokens = self.tokens if size is None else 1 + size[0] * size[1]
        if query.shape[2] != tokens:
            raise ValueError(f"query has {query.shape[2]} tokens, must have {tokens}")
        low_query, low_key = self.query(query), self.key(key)
        if active is not None:
            check_mask("active", active, query.shape[0], tokens - 1)
            pruned = ~F.pad(active, (1, 0), value=True)[:, None, :, None]
            low_query, low_key = low_query.masked_fill(pruned, 0), low_key.masked_fill(pruned, 0)
        return (low_query[:, :, 1:] @ (low_key.mT @ self._table(self.reduce, size)) * self.scale).softmax(-1)

    def scores(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        *,
        active: Bool[Tensor, "b patches"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Float[Tensor, "b h patches n"], Float[Tensor, "b h patches r"]]:
        """The estimated attention of every patch, and its coefficients."""
        rows = self.coefficient_rows(query, key, active, size)
        top, where = rows.topk(self.coefficients)
        rows = torch.zeros_like(rows).scatter(-1, where, top)
        basis = self._table(self.expand, size).abs()
        basis = basis.masked_fill(basis <= self.basis_threshold, 0)
        return rows @ basis.T, rows

    def reconstruction(
        self, query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h patches n"]:
        """The estimate as it is while the predictor is trained: all coefficients, the signed basis."""
        return self.coefficient_rows(query, key) @ self.expand.T

    def pick(
        self, scores: Float[Tensor, "b h patches n"], active: Bool[Tensor, "b patches"] | None = None
    ) -> Int[Tensor, "b h patches k"]:
        """The keys of every patch, best first; which of equal scores are taken is `torch.topk`'s choice."""
        budget = self.budget(scores.shape[-1])
        if active is not None:
            # All rows have the same number of active patches, as pruning leaves them.
            budget = min(budget, int(active[0].sum()))
            pruned = ~F.pad(active, (1, 0), value=True)[:, None, None]
            scores = scores.masked_fill(pruned, -torch.inf)
        return scores.detach().topk(budget).indices

    def groups(self, picked: Int[Tensor, "b h patches k"]) -> TokenGroups:
        """Every patch sees its picked keys, the class token everything, in groups of as many keys."""
        b, h, patches, budget = picked.shape
        tokens, size = patches + 1, max(1, budget)
        count = -(-tokens // size)
        everything = torch.arange(count * size, device=picked.device).view(count, size)
        everything = torch.where(everything < tokens, everything, -1).expand(b, h, count, size)
        if not budget:
            picked = picked.new_full((b, h, patches, 1), -1)
        rows = torch.arange(1, patches + 1, device=picked.device)
        rows = torch.cat([torch.zeros(count, dtype=rows.dtype, device=picked.device), rows])
        keys = torch.cat([everything, picked], dim=2)
        return TokenGroups(rows[None, None, :, None], keys, (tokens, tokens))

    def _table(self, table: Float[Tensor, "tokens r"], size: tuple[int, int] | None) -> Tensor:
        """The table for a map of this size: the row of the class token as it is, the others interpolated."""
        side = math.isqrt(self.tokens - 1)
        if size is None or size == (side, side):
            return table
        if side * side != self.tokens - 1:
            raise ValueError(
                f"size is {size}, must be None for {self.tokens - 1} patches, which are no square"
            )
        grid = table[1:].T.unflatten(1, (side, side))[None]
        grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)[0]
        return torch.cat([table[:1], grid.flatten(1).T])


def reconstruction_loss(
    estimate: Float[Tensor, "b h patches n"], attention: Float[Tensor, "b h n n"]
) -> Float[Tensor, ""]:
    """The sum of squared differences between an estimate and dense weights, their first row left out."""
    return (estimate - attention[:, :, 1:]).square().sum()


def keep_patches(
    class_weights: Float[Tensor, "b h patches"],
    keep: int,
    active: Bool[Tensor, "b patches"] | None = None,
) -> Bool[Tensor, "b patches"]:
    """The `keep` active patches that the class token attends to most, in the mean over heads."""
    score = class_weights.mean(1)
    if active is not None:
        score = score.masked_fill(~active, -torch.inf)
    best = score.topk(keep).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)
