"""Recurrences give shapes for tensors without numbers, so that large models are counted without computing."""

from __future__ import annotations

import pytest
import torch

from heedful.ops.delta import gated_delta_rule
from heedful.ops.linear import linear_attention
from heedful.ops.scan import selective_scan


@pytest.mark.parametrize("n", [2, 150])
def test_shapes(n):
    with torch.device("meta"):
        q, k, v, decay = torch.rand(2, 3, n, 4), torch.rand(2, 3, n, 4), torch.rand(2, 3, n, 5), torch.rand(3)
        assert linear_attention(q, k, v, -decay).shape == v.shape
        assert linear_attention(q, k, v, causal=False, normalize=True).shape == v.shape
        assert gated_delta_rule(q, k, v, torch.rand(2, 3, n)).shape == v.shape
        u, inputs = torch.rand(2, 6, n), torch.rand(2, 4, n)
        assert selective_scan(u, u, -torch.rand(6, 4), inputs, inputs).shape == u.shape
