"""InfiniteVL: the gated delta rule of fla (output, state, gradients), and the Gated DeltaNet layer."""

from __future__ import annotations

from typing import Any

import torch

from heedful.authors import load
from heedful.mixers.linear.gated_deltanet import GatedDeltaNet
from heedful.ops.delta import gated_delta_rule
from tests.parity.harness import Tensors, adapter


@adapter("gated-delta-rule")
def operator(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    names = ("q", "k", "v", "beta", "g", "h0")
    with torch.enable_grad():
        q, k, v, beta, g, h0 = leaves = [inputs[name].detach().requires_grad_() for name in names]
        query, key, value, beta, g = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v, beta, g))
        o, h = gated_delta_rule(query, key, value, beta, g, state=h0, return_state=True)
        o = o.transpose(1, 2)
        grads = torch.autograd.grad(o, leaves, inputs["do"])
    found = {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {"o": o.detach(), "h": h.detach(), **found}


@adapter("infinitevl-gated-deltanet")
def layer(config: Any, params: Tensors, inputs: Tensors) -> Tensors:
    mixer = GatedDeltaNet(
        config["hidden_size"],
        heads=config["num_linear_heads"],
        head_dim=config["linear_head_dim"],
        expand_v=float(config["expand_v"]),
        conv_size=config["conv_size"],
        eps=config["norm_eps"],
    )
    return {"y": load(mixer, params).eval()(inputs["x"])}
