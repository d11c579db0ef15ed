from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from heedful import create
from heedful.mixers.linear.gated_deltanet import GatedDeltaNet
from heedful.ops.short_conv import short_conv


def build(**arguments) -> GatedDeltaNet:
    torch.manual_seed(0)
    mixer = create("gated-deltanet", 12, heads=3, head_dim=5, conv_size=3, dtype=torch.float64, **arguments)
    with torch.no_grad():
        mixer.norm.weight.normal_()
        mixer.log_rate -= 2  # memories that last some tokens
    return mixer


def tokens(n: int = 9) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def convolved(x: Tensor, weight: Tensor, taps: Tensor) -> Tensor:
    """Projection, then tap by tap: the last tap is for the token itself."""
    z, size = x @ weight.T, taps.shape[-1]
    rows = []
    for t in range(len(z)):
        back = range(min(t + 1, size))
        rows.append(sum(z[t - i] * taps[:, 0, size - 1 - i] for i in back))
    return silu(torch.stack(rows))


def literal(x: Tensor, mixer: GatedDeltaNet, eps: float = 1e-5) -> Tensor:
    """One sequence, head by head and token by token."""
    d, e = mixer.head_dim, mixer.value_dim
    q = convolved(x, mixer.query.weight, mixer.query_conv.weight)
    k = convolved(x, mixer.key.weight, mixer.key_conv.weight)
    v = convolved(x, mixer.value.weight, mixer.value_conv.weight)
    beta = 1 / (1 + torch.exp(-x @ mixer.beta.weight.T))
    step = torch.log1p(torch.exp(x @ mixer.step.weight.T + mixer.step_bias))
    gate = silu(x @ mixer.gate.weight.T)
    heads = []
    for h in range(mixer.heads):
        S, rows = torch.zeros(d, e, dtype=torch.float64), []
        for t in range(len(x)):
            q_t, k_t = q[t, h * d : (h + 1) * d], k[t, h * d : (h + 1) * d]
            q_t = q_t / torch.sqrt(q_t @ q_t + 1e-6) / d**0.5
            k_t = k_t / torch.sqrt(k_t @ k_t + 1e-6)
            S = torch.exp(-torch.exp(mixer.log_rate[h]) * step[t, h]) * S
            S = S + torch.outer(k_t, beta[t, h] * (v[t, h * e : (h + 1) * e] - k_t @ S))
            o = q_t @ S
            o = o / torch.sqrt((o * o).mean() + eps) * mixer.norm.weight
            rows.append(o * gate[t, h * e : (h + 1) * e])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1) @ mixer.out.weight.T


def assert_same_with_gradients(y: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert_close(y, expected)
    weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_close(*(torch.autograd.grad((z * weight).sum(), leaves) for z in (y, expected)))


@pytest.mark.parametrize("arguments", [{}, {"expand_v": 1.0, "eps": 0.1}, {"expand_v": 0.4}])
def test_equals_the_steps_token_by_token(arguments):
    mixer, x = build(**arguments), tokens().requires_grad_()
    expected = torch.stack([literal(row, mixer, arguments.get("eps", 1e-5)) for row in x])
    assert_same_with_gradients(mixer(x), expected, [x, *mixer.parameters()])


def test_padding_is_as_if_it_were_not_there():
    mixer, x = build(), tokens().requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    mask[1, :4] = False
    y = mixer(x, mask=mask)
    expected = torch.cat([literal(x[0, :6], mixer), literal(x[1, 4:], mixer)])
    assert_same_with_gradients(y[mask], expected, [x, *mixer.parameters()])


def test_decoding_equals_the_full_pass():
    mixer, x = build(), tokens(70)
    state, parts = mixer.init_state(2), []
    size = state.nbytes()
    for start, stop in [(0, 1), (1, 2), (2, 40), *((t, t + 1) for t in range(40, 70))]:
        y, state = mixer(x[:, start:stop], state=state)
        parts.append(y)
    assert_close(torch.cat(parts, dim=1), mixer(x))
    assert state.nbytes() == size == 8 * 2 * (3 * 5 * 10 + 2 * (15 + 15 + 30))


def test_published_sizes():
    mixer = create("gated-deltanet", 2048, device="meta")
    assert sum(p.numel() for p in mixer.parameters()) == 33_653_024
    assert mixer.init_state(1).matrix.numel() == 524_288
    assert {n for n, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)} == {
        "log_rate",
        "step_bias",
    }


def test_first_values_of_rates_and_steps():
    torch.manual_seed(0)
    mixer = create("gated-deltanet", 1, heads=4000, head_dim=1, dtype=torch.float64)
    rates = mixer.log_rate.exp()
    steps = torch.nn.functional.softplus(mixer.step_bias)
    assert rates.min() > 0 and rates.max() < 16
    assert_close(rates.mean().item(), 8.0, atol=0.5, rtol=0.0)
    assert steps.min() >= 0.001 and steps.max() <= 0.1
    assert_close(steps.log().mean().item(), -4.6, atol=0.1, rtol=0.0)  # log(0.001 * 0.1) / 2


def test_bfloat16_keeps_the_memory_in_float32():
    y, state = build().bfloat16()(tokens().bfloat16(), state=build().bfloat16().init_state(2))
    assert (y.dtype, state.matrix.dtype) == (torch.bfloat16, torch.float32)
    assert state.key_past.dtype == torch.bfloat16


def test_short_conv():
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    y, past = short_conv(x, torch.tensor([[[100.0, 10.0, 1.0]]]))
    assert y.flatten().tolist() == [1, 12, 123, 234, 345, 456]
    assert past.flatten().tolist() == [5, 6]
    y, past = short_conv(x[:, :1], torch.tensor([[[100.0, 10.0, 1.0]]]), past)
    assert y.flatten().tolist() == [561]
    assert past.flatten().tolist() == [6, 1]


@pytest.mark.parametrize("keep", [0, 1 << 22])
def test_short_conv_in_pieces(keep, monkeypatch):
    """Pieces of four tokens, kept or computed again, equal torch's convolution and its gradients."""
    monkeypatch.setattr("heedful.ops.short_conv.PIECE", 24)
    monkeypatch.setattr("heedful.ops.short_conv.KEEP", keep)
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 11, 3), (3, 1, 4), (2, 3, 3)
    given = [torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in sizes]
    x, weight, past = given
    y, after = short_conv(x, weight, past)
    tokens = torch.cat([past, x], dim=1)
    wanted = F.conv1d(tokens.mT, weight, groups=3).mT
    torch.testing.assert_close(y, wanted)
    assert torch.equal(after, tokens[:, 11:])
    pull = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad((y * pull).sum() + after.square().sum(), given)
    expected = torch.autograd.grad((wanted * pull).sum() + tokens[:, 11:].square().sum(), given)
    torch.testing.assert_close(found, expected)


@pytest.mark.door
def test_errors_of_the_short_conv():
    x = torch.zeros(1, 6, 1)
    with pytest.raises(ValueError, match=r"weight has shape \(2, 1, 3\), must be \(1, 1, taps\)"):
        short_conv(x, torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=r"past has shape \(1, 1, 1\), must be \(1, 2, 1\)"):
        short_conv(x, torch.zeros(1, 1, 3), x[:, :1])


@pytest.mark.door
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "heads is 5, must divide dim"),
        ({"heads": 3, "conv_size": 0}, "conv_size is 0"),
        ({"heads": 3, "expand_v": 0.3}, r"expand_v is 0.3, must make 4 \(head_dim\) a whole number above 0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        create("gated-deltanet", 12, **arguments)
