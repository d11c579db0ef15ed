"""What the attentive pools share: hidden tokens, norms, attention of pooling queries, the feed-forward."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heedful.checks import check_mask, check_tokens
from heedful.ops.attention import attention


def visible_tokens(x: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """x, checked, with hidden tokens as zeros: they may hold anything, even NaN."""
    check_tokens("x", x, dim)
    check_mask("mask", mask, x.shape[0], x.shape[1])
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def mean_token(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (b, 1, c) of the visible tokens, hidden ones being zeros; zeros without a token."""
    if mask is None:
        return x.sum(1, keepdim=True) / max(x.shape[1], 1)
    return x.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]


def norm_tokens(
    norm: nn.BatchNorm1d, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b n c"]:
    """Batch norm over the tokens of the batch; over fewer than two it keeps the running statistics."""
    if not norm.training or mask is None:
        return _batch_norm(norm, x.flatten(0, 1)).view_as(x)
    # Padding must move neither the statistics of this batch nor the running ones.
    return torch.zeros_like(x).masked_scatter(mask[..., None], _batch_norm(norm, x[mask]))


def _batch_norm(norm: nn.BatchNorm1d, tokens: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    if norm.training and len(tokens) > 1:
        return norm(tokens)
    return nn.functional.batch_norm(
        tokens, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
    )


def attend(
    query: Float[Tensor, "b q c"],
    key: Float[Tensor, "b n c"],
    value: Float[Tensor, "b n c"],
    *,
    heads: int,
    mask: Bool[Tensor, "b n"] | None,
) -> Float[Tensor, "b q c"]:
    """Softmax attention of pooling queries over tokens; each head has c / heads channels."""
    query, value = query.to(key.dtype), value.to(key.dtype)  # autocast leaves unprojected ones wide
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return attention(query, key, value, key_mask=mask).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))) with `ratio` times as many hidden channels."""

    def __init__(
        self,
        dim: int,
        *,
        ratio: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(ratio * dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b q c"]) -> Float[Tensor, "b q c"]:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


def query_tokens(
    count: int, dim: int, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """Learned queries (1, count, dim), normal with standard deviation 0.02."""
    return nn.Parameter(0.02 * torch.randn(1, count, dim, device=device, dtype=dtype))
