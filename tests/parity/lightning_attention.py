"""Lightning Attention: the operator and its gradients (also the golden of its second paper), the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.authors import load
from heedful.mixers.linear.tnl_attention import TNLAttention
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


@adapter("lightning-attention-tnl")
def tnl(config: Any, params: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mixer = TNLAttention(
        config["embed_dim"],
        heads=config["num_heads"],
        layer_index=config["layer_idx"],
        layers=config["num_layers"],
        bias=config["bias"],
    )
    y = load(mixer, params).eval()(inputs["x"])
    return {"y": y, "slope_rate": -torch.tensor(mixer.log_decay, dtype=torch.float32)[:, None, None]}
