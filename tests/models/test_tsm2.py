from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from heedful.models.tsm2 import TSM2
from tests.literal import assert_same_with_gradients, layer_norm, scatter


def build(**arguments) -> TSM2:
    torch.manual_seed(0)
    model = TSM2(**{**TSM2.example, **arguments}).double()
    scatter(model)
    return model


def literal(x: Tensor, m: TSM2) -> Tensor:
    """One example (steps, variates): series by series and patch by patch."""

    def weighted(sums, tokens, channels):
        alpha, beta = (p.exp() / p.exp().sum() for p in (sums.tokens, sums.channels))
        pairs = [*zip(alpha, tokens, strict=True), *zip(beta, channels, strict=True)]
        return sum(weight * value for weight, value in pairs)

    mean = x.sum(0) / 20
    scale = ((x - mean).square().sum(0) / 20).sqrt() + 1e-5
    z = (x - mean) / scale
    first = []
    for v in range(x.shape[1]):
        patches = [z[start : start + 8, v] for start in (0, 4, 8, 12)]
        first.append(torch.stack([m.enter.weight @ p + m.enter.bias for p in patches]) + m.places)
    tokens, channels = [torch.stack(first)], [torch.stack(first)]  # (variates, patches, c)
    for level in range(len(m.time)):
        t = weighted(m.to_time[level], tokens, channels)
        seen = layer_norm(t, m.time_norms[level])
        tokens.append(t + torch.stack([m.time[level](series[None])[0] for series in seen]))
        c = weighted(m.to_variates[level], tokens, channels)
        seen = layer_norm(c, m.variate_norms[level])
        mixed = [m.variates[level](seen[:, p][None])[0] for p in range(4)]
        channels.append(c + torch.stack(mixed, dim=1))
    y = layer_norm(layer_norm(channels[-1], m.channel_norm).mT, m.patch_norm).mT
    return torch.stack([m.out.weight @ series.flatten() + m.out.bias for series in y], -1) * scale + mean


def test_equals_its_steps():
    m = build()
    x = torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)
    # Weights through a softmax of one alone have no gradient.
    leaves = [x, *(p for p in m.parameters() if p.numel() > 1)]
    assert_same_with_gradients(m(x), torch.stack([literal(row, m) for row in x]), leaves)


def test_forecasts_follow_level_and_scale_of_each_series():
    m, x = build(), torch.randn(2, 20, 3, dtype=torch.float64)
    scale, level = torch.tensor([2.0, 5.0, 0.5]).double(), torch.tensor([3.0, -7.0, 100.0]).double()
    # The 1e-5 beside the deviations is a relative 1e-5 for the smallest of them.
    assert_close(m(x * scale + level), m(x) * scale + level, rtol=1e-3, atol=1e-3)


def test_any_number_of_variates_and_their_order_matters():
    m, x = build(), torch.randn(1, 20, 4, dtype=torch.float64)
    assert m(x[..., :1]).shape == (1, 6, 1)
    order = [2, 0, 3, 1]
    assert not torch.allclose(m(x[..., order]), m(x)[..., order])


def test_learns_a_shift():
    torch.manual_seed(0)
    model = TSM2(**TSM2.example)
    t = torch.arange(26.0)
    phases = torch.rand(64, 1, 2) * 6.28
    waves = torch.sin(0.5 * t[None, :, None] + phases)
    past, future = waves[:, :20], waves[:, 20:]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = (model(past) - future).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="length is 4, must be at least patch, which is 16"):
        TSM2(4, 2)
    with pytest.raises(ValueError, match=r"x has shape \(1, 19, 2\), must be \(batch, 20, variates\)"):
        build()(torch.zeros(1, 19, 2).double())
