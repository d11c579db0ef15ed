"""ViM2: one stage step by step, what the weights of earlier features do, sizes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from heedful.models import parameters
from heedful.models.vim2 import CrossScanMixer, PooledChannelMixer, Residual, Stage, ViM2
from heedful.testing.check_backbone import image, make
from tests.literal import assert_same_with_gradients, depthwise, layer_norm, s6, scatter, silu


def stage(depth: int, side: int = 3) -> Stage:
    torch.manual_seed(0)
    return Stage(3, side, [0.0] * depth, state_dim=2, expand=2).double()


def cross_scan(x: Tensor, m: CrossScanMixer) -> Tensor:
    """One map (c, height, width): routes as lists of places."""
    _, height, width = x.shape
    flat = [x[:, i, j] for i in range(height) for j in range(width)]
    u = torch.stack([m.enter.weight @ token for token in flat], -1).view(-1, height, width)
    u = silu(depthwise(u, m.conv))
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    total = {}
    for r, route in enumerate((rows, rows[::-1], columns, columns[::-1])):
        scanned = s6(torch.stack([u[:, i, j] for i, j in route]), m.ssm, r)
        for place, y in zip(route, scanned, strict=True):
            total[place] = total.get(place, 0) + y
    out = [m.out.weight @ (total[i, j] * silu(m.gate.weight @ x[:, i, j])) for i, j in rows]
    return torch.stack(out, -1).view(x.shape)


def averaged(x: Tensor, side: int) -> Tensor:
    """Boxes from floor(i n / side) to ceil((i + 1) n / side) along each axis."""

    def box(i, n):
        return slice(i * n // side, -((-(i + 1) * n) // side))

    _, height, width = x.shape
    boxes = [x[:, box(i, height), box(j, width)].mean((1, 2)) for i in range(side) for j in range(side)]
    return torch.stack(boxes, -1).view(-1, side, side)


def interpolated(y: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, pixels being squares: what lies beyond the outermost centres is as at them."""

    def weights(n, side):
        rows = torch.zeros(n, side, dtype=torch.float64)
        for i in range(n):
            place = min(max((i + 0.5) * side / n - 0.5, 0.0), side - 1.0)
            low = math.floor(place)
            rows[i, low] += 1 - (place - low)
            if place > low:
                rows[i, low + 1] += place - low
        return rows

    return weights(height, y.shape[1]) @ y @ weights(width, y.shape[2]).T


def pooled_channels(x: Tensor, m: PooledChannelMixer) -> Tensor:
    """One map: the scan goes from channel to channel, a channel being a vector of side x side numbers."""
    mix, side = m.mixer.mix, m.side
    seen = averaged(x, side).flatten(1)  # c, n
    raw = seen @ mix.enter.weight.T
    rows = []
    for c in range(len(seen)):
        u = mix.conv.bias
        for tap in range(3):
            if 0 <= c + tap - 1 < len(seen):
                u = u + mix.conv.weight[:, 0, tap] * raw[c + tap - 1]
        rows.append(silu(u))
    y = s6(torch.stack(rows), mix.ssm, 0) + s6(torch.stack(rows[::-1]), mix.ssm, 1).flip(0)
    y = (y * silu(seen @ mix.gate.weight.T)) @ mix.out.weight.T
    return interpolated(y.view(-1, side, side), *x.shape[1:])


def residual(x: Tensor, m: Residual) -> Tensor:
    mixer = cross_scan if isinstance(m.mixer, CrossScanMixer) else pooled_channels
    return x + mixer(layer_norm(x.movedim(0, -1), m.norm).movedim(-1, 0), m.mixer)


def literal(x: Tensor, m: Stage) -> Tensor:
    tokens, channels = [x], [x]
    for level in range(len(m.tokens)):
        a, b = m.to_tokens[level].tokens, m.to_tokens[level].channels
        t = sum(a[i] * tokens[i] + b[i] * channels[i] for i in range(level + 1))
        tokens.append(residual(t, m.tokens[level]))
        a, b = m.to_channels[level].tokens, m.to_channels[level].channels
        c = sum(a[i] * tokens[i] for i in range(level + 2)) + sum(
            b[i] * channels[i] for i in range(level + 1)
        )
        channels.append(residual(c, m.channels[level]))
    return channels[-1]


@pytest.mark.parametrize("size", [(4, 5), (3, 3), (2, 3)])
def test_one_block_equals_its_steps(size):
    m = stage(1)
    scatter(m)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x), torch.stack([literal(row, m) for row in x]), [x, *m.parameters()])


def test_two_blocks_equal_their_steps():
    m = stage(2, side=2)
    scatter(m)
    x = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x), literal(x[0], m)[None], [x, *m.parameters()])


def test_a_stage_starts_as_a_chain_of_residuals():
    m = stage(3)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y = x
    for token, channel in zip(m.tokens, m.channels, strict=True):
        y = y + token.mixer(token.norm(y))
        y = y + channel.mixer(channel.norm(y))
    assert_close(m(x), y)


@pytest.mark.parametrize("layer", range(3))
def test_the_last_mixer_hears_each_earlier_layer_directly(layer):
    """With only the weight of T_layer (or C_layer) left, that layer learns, the next does not."""
    for kind, sums in (("tokens", "tokens"), ("channels", "channels")):
        m = stage(4)
        with torch.no_grad():
            m.to_channels[-1].tokens.zero_()
            m.to_channels[-1].channels.zero_()
            getattr(m.to_channels[-1], sums)[layer + 1] = 1.0
        m(torch.randn(1, 3, 4, 4, dtype=torch.float64)).square().sum().backward()
        reached = getattr(m, kind)[layer]
        assert all(p.grad is not None and p.grad.any() for p in reached.parameters())
        behind = m.tokens[layer + 1].parameters()
        assert not any(p.grad.any() for p in behind if p.grad is not None)


def test_gradients_reach_all_layers_and_weights_from_the_start():
    torch.manual_seed(0)
    model = ViM2(**ViM2.example).double()
    model(image(model)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_channels_see_every_token_and_have_an_order():
    mixer = stage(1).channels[0].mixer
    x = torch.randn(1, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    seen = torch.autograd.grad(mixer(x)[0, 2, 3, 3], x)[0]
    assert seen.ne(0).all()
    order = [2, 0, 1]
    assert not torch.allclose(mixer(x[:, order]), mixer(x)[:, order])


def count(classes, in_channels, depths, dims, sides, state, expand):
    """Layer by layer, from the formulas."""

    def mixer(width, routes, taps):
        inner, rank = expand * width, math.ceil(width / 16)
        scan = (rank + 2 * state) * inner + inner * rank + inner + inner * state + inner
        return 3 * width * inner + inner * (taps + 1) + routes * scan

    total = (16 * in_channels + 1) * dims[0] + 2 * dims[0]  # the first map and its norm
    for a, b in pairwise(dims):
        total += 8 * a + 4 * a * b
    for depth, dim, side in zip(depths, dims, sides, strict=True):
        for level in range(1, depth + 1):
            total += 4 * dim + mixer(dim, 4, 9) + mixer(side * side, 2, 3) + 2 * level + 2 * level + 1
    return total + 2 * dims[-1] + (dims[-1] + 1) * classes


@pytest.mark.parametrize(
    "how", [{"expand": 2, "in_channels": 1}, {"depths": (1, 1, 3, 1), "dims": (18, 20, 33, 40)}]
)
def test_parameters(how):
    sizes = {"in_channels": 3, "expand": 1, **ViM2.example, **how}
    expected = count(
        *(
            sizes[name]
            for name in ("classes", "in_channels", "depths", "dims", "sides", "state_dim", "expand")
        )
    )
    assert parameters(ViM2(**sizes)) == expected


@pytest.mark.parametrize("size", [(4, 4), (5, 37), (39, 53)])
def test_any_size(size):
    maps = make(ViM2, features_only=True).features(torch.randn(1, 3, *size, dtype=torch.float64))
    height, width = size[0] // 4, size[1] // 4
    for y in maps:
        assert y.shape[2:] == (height, width)
        assert y.isfinite().all()
        height, width = -(-height // 2), -(-width // 2)


def test_rates_of_stochastic_depth_grow_with_the_blocks():
    torch.manual_seed(0)
    rates = [
        layer.drop_path.rate
        for part in ViM2(**ViM2.example, drop_path=0.4).stages
        for layer in (*part.tokens, *part.channels)
    ]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.1, 0.2, 0.3, 0.3, 0.4, 0.4])


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"sides\[1\] is 0"):
        ViM2(**{**ViM2.example, "sides": (4, 0, 3, 2)})
    with pytest.raises(ValueError, match="must have 4 entries, one for each stage"):
        ViM2(**{**ViM2.example, "sides": (4, 3)})
    with pytest.raises(ValueError, match="expand is 0"):
        ViM2(**ViM2.example, expand=0)
