"""One tile of attention: queries against a few keys, forward and backward.

Shapes: query (b, h, n, d), key (b, h, m, d), value (b, h, m, e); additive (b|1, h|1, n, m) holds the
bias and -inf where a pair is hidden. lse is the log-sum-exp over all keys of the row, also those of
other tiles; that is why tiles of one row can be computed one by one in backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ONCE = (
    "backend 'tiled' of heedful.attention is differentiable once; backend='reference' is, any number of times"
)
_FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def can_fuse(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's fused CPU attention fits: padding one width to the other must not cost too much."""
    d, e = query.shape[-1], value.shape[-1]
    return query.device.type == "cpu" and query.dtype in _FUSED_DTYPES and max(d, e) <= 2 * min(d, e)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additive: Tensor | None,
    scale: float,
    keep: Tensor | None,
    fused: bool,
    blind: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the tile. keep: dropout factors. blind: rows that see nothing, as `blind_rows` finds
    them; they give zeros and -inf."""
    if not fused or keep is not None:
        return _forward_plain(query, key, value, additive, scale, keep)
    width = value.shape[-1]
    query, key, value = _same_width(query, key, value)
    out, lse = _flash(query, key, value, 0.0, False, attn_mask=additive, scale=scale)
    out = out[..., :width]
    if blind is not None:  # what the fused kernel gives for such rows is undefined
        out = out.masked_fill(blind[..., None], 0.0)
        lse = lse.masked_fill(blind, -torch.inf)
    return out, lse


def blind_rows(additive: Tensor | None) -> Tensor | None:
    """(b|1, h|1, n), True for rows that see nothing; None if there is none."""
    if additive is None:
        return None
    blind = (additive == -torch.inf).all(-1)
    return blind if bool(blind.any()) else None


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    additive: Tensor | None,
    scale: float,
    keep: Tensor | None,
    fused: bool,
    want_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and (if wanted) of the logits; lse must be finite (0 for blind rows)."""
    if not fused or keep is not None or grad_lse is not None or want_scores:
        return _backward_plain(
            grad, grad_lse, query, key, value, out, lse, additive, scale, keep, want_scores
        )
    d, e = query.shape[-1], value.shape[-1]
    query, key, value = _same_width(query, key, value)
    if out.shape[-1] != query.shape[-1]:
        grad, out = (F.pad(x, (0, query.shape[-1] - e)) for x in (grad, out))
    dq, dk, dv = _flash_backward(
        grad, query, key, value, out, lse, 0.0, False, attn_mask=additive, scale=scale
    )
    return dq[..., :d], dk[..., :d], dv[..., :e], None


def _same_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    most = max(query.shape[-1], value.shape[-1])
    if query.shape[-1] == value.shape[-1]:
        return query, key, value
    query, key, value = (F.pad(x, (0, most - x.shape[-1])) for x in (query, key, value))
    return query, key, value


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _forward_plain(
    query: Tensor, key: Tensor, value: Tensor, additive: Tensor | None, scale: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = _wide(query) @ _wide(key).transpose(-1, -2) * scale
    if additive is not None:
        scores = scores + additive
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp_()
    if keep is not None:
        weights *= keep
    return (weights @ _wide(value)).to(query.dtype), lse


def _backward_plain(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    additive: Tensor | None,
    scale: float,
    keep: Tensor | None,
    want_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, g = _wide(query), _wide(key), _wide(value), _wide(grad)
    scores = q @ k.transpose(-1, -2) * scale
    if additive is not None:
        scores = scores + additive
    weights = (scores - lse[..., None]).exp_()
    # d loss / d logit_ij = P_ij (dP_ij - sum_j P_ij dP_ij + d loss / d lse_i)
    center = (g * _wide(out)).sum(-1)
    if grad_lse is not None:
        center = center - grad_lse
    dweights = g @ v.transpose(-1, -2)
    if keep is not None:
        dweights *= keep
        dv = (weights * keep).transpose(-1, -2) @ g
    else:
        dv = weights.transpose(-1, -2) @ g
    dscores = dweights.sub_(center[..., None]).mul_(weights)
    dq = dscores @ k * scale
    dk = dscores.transpose(-1, -2) @ q * scale
    return dq, dk, dv, dscores if want_scores else None
