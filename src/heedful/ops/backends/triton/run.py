"""Which calls Triton serves, and the operator with its gradients."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from heedful.ops.backends import reference
from heedful.ops.backends.triton.lists import Lists, pattern_lists, table_lists
from heedful.ops.bias import FactoredBias
from heedful.ops.call import Call
from heedful.ops.once import differentiable_once
from heedful.selection import BlockTable, TokenGroups

ONCE = "backend 'triton' of heedful.attention is differentiable once; backend='reference' is, at any order"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST, _MOST_RANK = 256, 128


def unsupported(call: Call) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if not call.query.is_cuda:
        from heedful.ops.backends.triton.launch import INTERPRETED

        if not INTERPRETED or call.query.device.type != "cpu":
            return f"runs on CUDA (and with TRITON_INTERPRET=1 on a CPU), not on {call.query.device.type}"
    if isinstance(call.selection, TokenGroups):
        return "takes no token groups"
    if call.dropout_p:
        return "has no dropout"
    if call.query.dtype not in _DTYPES:
        return f"computes float16, bfloat16 and float32, not {call.query.dtype}"
    if max(call.query.shape[-1], call.value.shape[-1]) > _WIDEST:
        return f"takes head widths up to {_WIDEST}, not {call.query.shape[-1]} and {call.value.shape[-1]}"
    if isinstance(call.bias, FactoredBias):
        if call.bias.rank > _MOST_RANK:
            return f"takes factored biases up to rank {_MOST_RANK}, not {call.bias.rank}"
        if call.repeats > 1 and call.bias.key.shape[1] > 1:
            return "takes bias key factors for one head where query heads share a KV head"
    elif call.bias is not None:
        return "takes no additive bias tensors, but a FactoredBias"
    return None


def suits(device: torch.device) -> bool:
    """Whether the tile sizes were chosen for this GPU: NVIDIA's since Ampere."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.disable
def run(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) of the call. Differentiable once: a second backward raises an error that says so."""
    if call.query.numel() == 0 or call.key.numel() == 0 or call.value.numel() == 0:
        out, lse = reference.run(call)  # nothing to walk over
        assert lse is not None
        return out, lse
    query, scale = call.query, call.scale
    if scale <= 0:
        # The kernel takes the largest logit before it scales.
        query, scale = query * (-1.0 if scale else 0.0), -scale or 1.0
    if isinstance(call.selection, BlockTable):
        lists = table_lists(call.selection, call.repeats)
    else:
        assert not isinstance(call.selection, TokenGroups)
        lists = pattern_lists(
            call.selection, call.n, call.m, call.query_offset, call.repeats, call.query.device
        )
    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    if isinstance(call.bias, FactoredBias) and call.bias.rank:
        factors = call.bias.for_heads(call.heads)
    job = Job(lists, scale, call.key_mask)
    return _Attend.apply(query, call.key, call.value, *factors, call.sink_logits, job)


@dataclass(frozen=True, eq=False)
class Job:
    """What the kernels need besides tensors that take gradients."""

    lists: Lists
    scale: float
    key_mask: Tensor | None


class _Attend(Function):
    """(out, lse) of query (b, hq, n, d), key (b, hkv, m, d), value (b, hkv, m, e), factors of a bias
    (b|1, hq|1, n, r) and (b|1, hq|1, m, r) or None, sink (hq,) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_factor: Tensor | None,
        key_factor: Tensor | None,
        sink: Tensor | None,
        job: Job,
    ) -> tuple[Tensor, Tensor]:
        from heedful.ops.backends.triton.launch import forward

        out, lse = forward(query, key, value, query_factor, key_factor, sink, job)
        ctx.save_for_backward(query, key, value, query_factor, key_factor, sink, out, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once(ONCE)
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        from heedful.ops.backends.triton.launch import backward

        query, key, value, query_factor, key_factor, sink, out, lse = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(out)
        found = backward(query, key, value, query_factor, key_factor, out, lse, grad, grad_lse, ctx.job)
        dsink = None
        if sink is not None and ctx.needs_input_grad[5]:
            # d loss / d sink = sum_i exp(sink - lse_i) (d lse_i - g_i . out_i)
            weight = (sink.to(lse.dtype)[:, None] - lse).exp()
            dsink = -(weight * found.center).sum((0, 2)).to(sink.dtype)
        return found.query, found.key, found.value, found.query_factor, found.key_factor, dsink, None
