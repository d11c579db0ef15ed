"""Counting parameters and multiply-adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from heedful.ops.counting import counted


def parameters(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, *inputs: Any, **named: Any) -> int:
    """Multiply-adds of one forward pass in eval mode, as papers count them ("FLOPs").

    Matrix products, convolutions and fused attention are counted; norms, activations, additions, and what a
    custom operator does inside are not.
    """
    cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def fused(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    counter = FlopCounterMode(display=False, custom_mapping={cpu_flash: fused})
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), counted(), counter:
            model(*inputs, **named)
    finally:
        model.train(training)
    return counter.get_total_flops() // 2
