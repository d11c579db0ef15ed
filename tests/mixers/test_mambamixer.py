from __future__ import annotations

import pytest
import torch
from tests.literal import assert_same_with_gradients, s6, scatter, silu
from torch import Tensor
from torch.testing import assert_close

from heedful.mixers.scan.mambamixer import SelectiveChannelMixer, SelectiveMix, SelectiveTokenMixer
from heedful.models.mambamixer import MambaMixer, WeightedEarlierFeatures


def build(kind: type = SelectiveTokenMixer, **arguments):
    torch.manual_seed(0)
    mixer = kind(5, **{"state_dim": 2, "expand": 2, **arguments}, dtype=torch.float64)
    scatter(mixer)
    return mixer


def literal(x: Tensor, m: SelectiveMix) -> Tensor:
    """One sequence (n, c), token by token."""
    raw, taps = x @ m.enter.weight.T, m.conv.kernel_size[0]
    first = taps - 1 if m.causal else (taps - 1) // 2  # taps before the token itself
    rows = []
    for t in range(len(x)):
        u = m.conv.bias
        for i in range(taps):
            if 0 <= t - first + i < len(x):
                u = u + m.conv.weight[:, 0, i] * raw[t - first + i]
        rows.append(silu(u))
    y = s6(torch.stack(rows), m.ssm, 0)
    if not m.causal:
        y = y + torch.stack(list(s6(torch.stack(rows[::-1]), m.ssm, 1))[::-1])
    return (y * silu(x @ m.gate.weight.T)) @ m.out.weight.T


@pytest.mark.parametrize("how", [{}, {"causal": True}, {"conv_size": 4}, {"causal": True, "conv_size": 1}])
def test_tokens_equal_the_steps(how):
    m = build(**how)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(m(x), torch.stack([literal(row, m.mix) for row in x]), [x, *m.parameters()])


@pytest.mark.parametrize("n", [7, 4])
def test_channels_equal_the_steps_on_the_transposed_map(n):
    m = build(SelectiveChannelMixer, length=7)
    x = torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True)
    filled = torch.cat([x, torch.zeros(2, 7 - n, 5, dtype=torch.float64)], dim=1)
    expected = torch.stack([literal(row.T, m.mix).T[:n] for row in filled])
    assert_same_with_gradients(m(x), expected, [x, *m.parameters()])
    order = [3, 0, 4, 1, 2]
    assert not torch.allclose(m(x[..., order]), m(x)[..., order])  # channels have an order


def test_decoding():
    m = build(causal=True)
    x = torch.randn(2, 12, 5, dtype=torch.float64)
    state, parts = m.init_state(2), []
    for piece in x.split([1, 4, 1, 1, 5], dim=1):
        y, state = m(piece, state=state)
        parts.append(y)
    assert_close(torch.cat(parts, 1), m(x))
    assert state.nbytes() == 8 * 2 * (10 * 2 + 2 * 10)


def test_reversed_tokens_with_swapped_directions_give_the_reversed_output():
    m, other = build(), build()
    with torch.no_grad():
        other.mix.conv.weight.copy_(m.mix.conv.weight.flip(2))
        for name, parameter in other.mix.ssm.named_parameters():
            parameter.copy_(getattr(m.mix.ssm, name).flip(0))
    x = torch.randn(1, 8, 5, dtype=torch.float64)
    assert_close(other(x.flip(1)).flip(1), m(x))


def model(**arguments) -> MambaMixer:
    torch.manual_seed(0)
    return MambaMixer(5, depth=3, length=6, state_dim=2, **arguments, dtype=torch.float64)


def test_model_starts_as_a_chain_with_residuals():
    m = model()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    y = x
    for token, channel in zip(m.tokens, m.channels, strict=True):
        mixed = token(y)
        y = channel(mixed + y)
    assert_close(m(x), y)


@pytest.mark.parametrize("normalized", [False, True])
def test_model_sums_all_earlier_features(normalized):
    m = model(normalized=normalized)
    scatter(m)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)

    def weights(parameter):
        return parameter.exp() / parameter.exp().sum() if normalized else parameter

    tokens, channels = [x], [x]
    for level in range(3):
        alpha, beta = (weights(p) for p in (m.to_tokens[level].tokens, m.to_tokens[level].channels))
        total = sum(alpha[i] * tokens[i] + beta[i] * channels[i] for i in range(level + 1))
        tokens.append(m.tokens[level](total))
        theta, gamma = (weights(p) for p in (m.to_channels[level].tokens, m.to_channels[level].channels))
        total = sum(theta[i] * tokens[i] for i in range(level + 2))
        total = total + sum(gamma[i] * channels[i] for i in range(level + 1))
        channels.append(m.channels[level](total))
    leaves = [x, *(p for n, p in m.named_parameters() if not (normalized and n == "to_tokens.0.tokens"))]
    if normalized:  # a softmax over a single weight is 1 and has no gradient
        leaves = [leaf for leaf in leaves if leaf.numel() > 1]
    assert_same_with_gradients(m(x), channels[-1], leaves)


def test_normalized_weights_start_equal():
    summed = WeightedEarlierFeatures(2, 4, start=(True, True), normalized=True)
    ones = torch.ones(3)
    assert_close(summed([ones, 3 * ones], [ones, ones, ones, 5 * ones]), (2 + 2) * ones)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="conv_size is 0"):
        SelectiveTokenMixer(8, conv_size=0)
    with pytest.raises(ValueError, match="x has 8 tokens, must have at most length, which is 7"):
        build(SelectiveChannelMixer, length=7)(torch.zeros(1, 8, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="depth is 0"):
        MambaMixer(8, depth=0, length=4)
