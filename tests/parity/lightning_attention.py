"""Lightning Attention, the operator: output and gradients (also the golden of lightning-attention-2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.ops.linear import linear_attention
from tests.parity.harness import adapter


@adapter("lightning-attention", "lightning-attention-h6", "lightning-attention-nodecay")
def operator(config: Any, params: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    log_decay = -inputs["s"].flatten() if "s" in inputs else None  # s (h, 1, 1) are rates
    with torch.enable_grad():
        q, k, v = (inputs[name].detach().requires_grad_() for name in "qkv")
        o = linear_attention(q, k, v, log_decay)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), inputs["do"])
    return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}
