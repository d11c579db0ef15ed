"""PyTorch's fused `scaled_dot_product_attention`, with its gaps covered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.ops.call import Call
from heedful.patterns.causal import Causal
from heedful.selection import TokenGroups


def unsupported(call: Call) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if call.return_lse:
        return "gives no log-sum-exp"
    if call.sink_logits is not None:
        return "knows no sink logits"
    if isinstance(call.selection, TokenGroups) and (
        call.selection.key_bias is not None or call.selection.query_weight is not None
    ):
        return "knows no groups with biases or weights"
    return None


def holds_scores(call: Call) -> bool:
    """Whether the computation makes an n x m buffer of its own; the caller's bias is the caller's."""
    causal = _is_square_causal(call)
    if call.selection is not None and not causal:
        return True
    if isinstance(call.bias, Tensor):
        # PyTorch falls back to a dense computation where the bias wants a gradient.
        trained = torch.is_grad_enabled() and call.bias.requires_grad
        return causal or call.key_mask is not None or trained
    return causal and call.key_mask is not None


def run(call: Call) -> tuple[Tensor, None]:
    call = call.widened()
    query, key, value = call.query, call.key, call.value
    dtype, width = query.dtype, value.shape[-1]
    if width != query.shape[-1]:
        # The fused kernels want equal widths; zeros change neither logits nor outputs.
        most = max(query.shape[-1], width)
        query, key, value = (F.pad(x, (0, most - x.shape[-1])) for x in (query, key, value))
    if call.repeats > 1:
        key, value = (x.repeat_interleave(call.repeats, dim=1) for x in (key, value))
    causal = _is_square_causal(call) and call.key_mask is None and call.bias is None
    seen = None if causal else call.mask()
    bias = call.bias
    assert bias is None or isinstance(bias, Tensor)
    mask: Tensor | None = seen
    if bias is not None:
        mask = bias.to(dtype)
        if seen is not None:
            mask = mask.masked_fill(~seen, -torch.inf)
    if mask is not None:
        mask = mask.expand(*torch.broadcast_shapes(mask.shape, (1, 1, call.n, call.m)))
    if mask is not None and not torch.is_grad_enabled():
        mask = mask.detach()  # PyTorch keeps its fused kernel from a mask that asks for a gradient, even here
    if mask is not None and _makes_logits(call, mask):
        # PyTorch would look at all logits for rows that are -inf; the bias has fewer.
        blind = (mask == -torch.inf).all(-1, keepdim=True)
        weights = (query * call.scale @ key.mT + mask.masked_fill(blind, 0.0)).softmax(-1)
        return (weights @ value[..., :width]).masked_fill(blind, 0.0), None
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=call.dropout_p, is_causal=causal, scale=call.scale
    )
    out = out[..., :width]
    if seen is not None:
        # What the fused kernels give for a row that sees nothing is not defined.
        out = out.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return out, None


def _is_square_causal(call: Call) -> bool:
    return isinstance(call.selection, Causal) and bool(call.n == call.m) and bool(call.query_offset == 0)


def _makes_logits(call: Call, mask: Tensor) -> bool:
    """Whether PyTorch would make the logits, for the gradient of a bias, and no faster than we do here."""
    return (
        mask.requires_grad
        and mask.device.type == "cpu"
        and call.key_mask is None
        and call.selection is None
        and not call.dropout_p
        and call.query.dtype in (torch.float32, torch.float64)
    )
