"""Where a text turns: a small network over keys that scores every gap between tokens as a chunk boundary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heedful.checks import check_divides, check_positive
from heedful.registry import register

_CHUNK = 256  # gaps looked at in one go: what lies between stays in the cache
_ROWS = 1 << 22  # attention weights held in one go


@register("boundary-predictor", kind="routing", paper="dhsa", tags=("chunks",), complexity="O(N W C^2)")
class BoundaryPredictor(nn.Module):
    """A logit for each gap t | t + 1, from the `window` tokens before it and the `window` after.

        e = LayerNorm(MultiHeadAttention(x[t - window + 1 .. t + window])),  l, r = means of its halves
        logit_t = W2 relu(W1 [l, r, |l - r|, l r, cosine(l, r)] + b1) + b2

    Tokens before the start and after the end count as zeros.

    dim     channels of x: all KV heads side by side
    heads   a divisor of `dim`
    window  tokens on each side;  hidden: width of the MLP
    Source: DHSA, arXiv 2510.24606.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 4,
        hidden: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        check_positive("window", window)
        check_positive("hidden", hidden)
        self.window = window
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(4 * dim + 1, hidden, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(hidden, 1, device=device, dtype=dtype),
        )

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        w = self.window
        # The projections of a token are the same in every window that it stands in.
        padded = F.pad(x, (0, 0, w - 1, w))
        mha = self.attention
        projected = F.linear(padded, mha.in_proj_weight, mha.in_proj_bias)
        parts = [
            self._gaps(projected[:, at : at + _CHUNK + 2 * w - 1]) for at in range(0, x.shape[1], _CHUNK)
        ]
        return torch.cat(parts, dim=1) if parts else x[..., 0]

    def _gaps(self, projected: Float[Tensor, "b m c3"]) -> Float[Tensor, "b n"]:
        mha, w = self.attention, self.window
        windows = projected.unfold(1, 2 * w, 1)
        query, key, value = rearrange(windows, "b n (s h d) w -> s (b n) h w d", s=3, h=mha.num_heads)
        mixed = rearrange(F.scaled_dot_product_attention(query, key, value), "bn h w d -> bn w (h d)")
        encoded = self.norm(mha.out_proj(mixed))
        left, right = encoded[:, :w].mean(1), encoded[:, w:].mean(1)
        alike = F.cosine_similarity(left, right, dim=-1)[:, None]
        features = torch.cat([left, right, (left - right).abs(), left * right, alike], dim=-1)
        return self.mlp(features).view(windows.shape[:2])


def greedy_boundaries(
    scores: Float[Tensor, "b n"], *, threshold: float, most: int, distance: int, end: int
) -> list[list[int]]:
    """The published choice, row by row: ends t of chunks, ascending, `end` always among them.

    Gaps above the threshold are taken best first, if more than `distance` away from all that are taken and
    not after `end`, until there are `most`. It looks at the whole sequence.
    """
    rows = []
    for row in scores.detach():
        taken = [end]
        candidates = (row > threshold).nonzero()[:, 0]
        for t in candidates[row[candidates].argsort(descending=True, stable=True)].tolist():
            if len(taken) >= most:
                break
            if t <= end and all(abs(t - other) > distance for other in taken):
                taken.append(t)
        rows.append(sorted(taken))
    return rows


def published_boundaries(
    scores: Float[Tensor, "b n"], *, window: int, threshold: float, most: int, distance: int, end: int
) -> Int[Tensor, "b c"]:
    """Boundaries of the chunks that `greedy_boundaries` ends: 0, one past each end, and n.

    The `window` - 1 gaps at the start and the `window` at the end do not count. Rows with fewer chunks end
    in empty ones.
    """
    n = scores.shape[1]
    scores = scores.detach().clone()
    scores[:, : window - 1], scores[:, max(0, n - window) :] = -100.0, -100.0
    rows = greedy_boundaries(scores, threshold=threshold, most=most, distance=distance, end=end)
    width = max(map(len, rows), default=0)
    filled = [[0, *(min(t + 1, n) for t in row)] + [n] * (width + 1 - len(row)) for row in rows]
    return torch.tensor(filled, device=scores.device).view(len(rows), width + 2)


def peak_boundaries(scores: Float[Tensor, "b n"], *, threshold: float, distance: int) -> Bool[Tensor, "b n"]:
    """The strict causal choice: gaps above the threshold, the largest within `distance` on both sides.

    Whether t is one can be told from scores up to t + distance. Of equal scores the first counts.
    """
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    reach = F.pad(scores.detach()[:, None], (distance, distance), value=-torch.inf)
    before = F.max_pool1d(reach[..., : -distance - 1], distance, 1)[:, 0] if distance else -torch.inf
    after = F.max_pool1d(reach[..., distance + 1 :], distance, 1)[:, 0] if distance else -torch.inf
    return (scores > threshold) & (scores > before) & (scores >= after)


def boundary_ratios(
    weights: Float[Tensor, "b n m"], *, window: int, start: int = 0, total: int | None = None
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
    """The mass that later queries give to the `window` tokens before each gap t | t + 1, and to those after.

    weights  rows start, start + 1, ... of an attention matrix; rows from t + window on count for gap t.
             Masses of several groups of rows are added up; `mass_ratio` makes labels of the sums.
    """
    m = weights.shape[-1]
    summed = F.pad(weights.double().cumsum(-1), (window, window), value=0.0)
    summed[..., m + window :] = summed[..., m + window - 1 : m + window]
    at = torch.arange(m, device=weights.device) + window
    past = summed[..., at] - summed[..., at - window]
    future = summed[..., at + window] - summed[..., at]
    rows = torch.arange(start, start + weights.shape[1], device=weights.device)[:, None]
    counts = rows >= torch.arange(m, device=weights.device) + window
    return (past * counts).sum(1), (future * counts).sum(1)


def mass_ratio(
    past: Float[Tensor, "b m"], future: Float[Tensor, "b m"], *, window: int, floor: float = 1e-6
) -> Float[Tensor, "b m"]:
    """(larger + floor) / (smaller + floor) of the two masses; 0 within 2 window tokens of either end."""
    m = past.shape[-1]
    ratio = (past.maximum(future) + floor) / (past.minimum(future) + floor)
    place = torch.arange(m, device=past.device)
    return ratio * ((place >= 2 * window - 1) & (place < m - 2 * window))


@torch.no_grad()
def attention_ratios(
    query: Float[Tensor, "b hq n d"], key: Float[Tensor, "b hkv n d"], *, window: int
) -> Float[Tensor, "b n"]:
    """`mass_ratio` of causal dense attention, mean over heads, computed a few rows at a time: O(n^2) time."""
    b, h, n, d = query.shape
    past = future = torch.zeros(b, n, dtype=torch.float64, device=query.device)
    step = max(1, _ROWS // max(1, b * h * n))
    for start in range(0, n, step):
        rows = query[:, :, start : start + step].unflatten(1, (key.shape[1], -1))
        logits = torch.einsum("bgrnd,bgmd->bgrnm", rows, key) * d**-0.5
        place = torch.arange(start, start + rows.shape[3], device=query.device)[:, None]
        hidden = torch.arange(n, device=query.device) > place
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean((1, 2))
        more = boundary_ratios(weights, window=window, start=start)
        past, future = past + more[0], future + more[1]
    return mass_ratio(past, future, window=window)


def boundary_loss(
    logits: Float[Tensor, "b n"],
    ratios: Float[Tensor, "b n"],
    *,
    gamma: float = 2.0,
    positive_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Focal binary cross-entropy against sigmoid(4 ln ratio), the mean over gaps whose ratio is not 0."""
    valid = ratios > 0
    target = torch.sigmoid(4 * ratios.masked_fill(~valid, 1.0).log()).to(logits.dtype)
    weight = logits.new_tensor(positive_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weight)
    p = logits.sigmoid()
    away = (1 - (p * target + (1 - p) * (1 - target))) ** gamma
    return (loss * away * valid).sum() / valid.sum().clamp(min=1)


def chunk_ends(accepted: Bool[Tensor, "b n"]) -> Int[Tensor, "b c"]:
    """One past the last token of each chunk, ascending; rows with fewer are filled with n."""
    n = accepted.shape[1]
    place = torch.arange(1, n + 1, device=accepted.device)
    ends = torch.where(accepted, place, n).sort(dim=1).values
    if torch.compiler.is_compiling():
        return ends  # a shape that does not depend on the data keeps the graph whole
    return ends[:, : int(accepted.sum(1).max()) if accepted.numel() else 0]
