from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from heedful import authors, create
from heedful.mixers.scan.mamba import Mamba


def build(**arguments) -> Mamba:
    torch.manual_seed(0)
    mixer = create("mamba", 20, dtype=torch.float64, **{"state_dim": 3, "conv_size": 3, **arguments})
    with torch.no_grad():
        mixer.skip.normal_()
        mixer.log_rate -= torch.rand_like(mixer.log_rate)
        mixer.step.bias += 2  # steps that matter within some tokens
    return mixer


def tokens(n: int = 9) -> Tensor:
    return torch.randn(2, n, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def literal(x: Tensor, mixer: Mamba) -> Tensor:
    """One sequence, token by token."""
    E, S, R, taps = mixer.inner, mixer.state_dim, mixer.rank, mixer.conv.kernel_size[0]
    xz = x @ mixer.enter.weight.T
    raw, z = xz[:, :E], xz[:, E:]
    h, rows = torch.zeros(E, S, dtype=torch.float64), []
    for t in range(len(x)):
        u = mixer.conv.bias
        for i in range(min(t + 1, taps)):
            u = u + raw[t - i] * mixer.conv.weight[:, 0, taps - 1 - i]
        u = silu(u)
        read = mixer.read.weight @ u
        r, B, C = read[:R], read[R : R + S], read[R + S :]
        delta = torch.log1p(torch.exp(mixer.step.weight @ r + mixer.step.bias))
        rates = -torch.exp(mixer.log_rate)
        h = torch.exp(delta[:, None] * rates) * h + torch.outer(delta * u, B)
        rows.append((h @ C + mixer.skip * u) * silu(z[t]))
    return torch.stack(rows) @ mixer.out.weight.T


def assert_same_with_gradients(y: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert_close(y, expected)
    weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_close(*(torch.autograd.grad((z * weight).sum(), leaves) for z in (y, expected)))


@pytest.mark.parametrize("arguments", [{}, {"expand": 1, "state_dim": 1}, {"conv_size": 1}])
def test_equals_the_steps_token_by_token(arguments):
    mixer, x = build(**arguments), tokens().requires_grad_()
    expected = torch.stack([literal(row, mixer) for row in x])
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
    mixer, x = build(), tokens(60)
    state, parts = mixer.init_state(2), []
    size = state.nbytes()
    for start, stop in [(0, 1), (1, 2), (2, 40), *((t, t + 1) for t in range(40, 60))]:
        y, state = mixer(x[:, start:stop], state=state)
        parts.append(y)
    assert_close(torch.cat(parts, dim=1), mixer(x))
    assert state.length == 60
    assert state.nbytes() == size == 8 * 2 * (40 * 3 + 2 * 40)


def test_the_authors_names():
    mixer = build()
    names = {
        "in_proj.weight": mixer.enter.weight,
        "conv1d.weight": mixer.conv.weight,
        "conv1d.bias": mixer.conv.bias,
        "x_proj.weight": mixer.read.weight,
        "dt_proj.weight": mixer.step.weight,
        "dt_proj.bias": mixer.step.bias,
        "A_log": mixer.log_rate,
        "D": mixer.skip,
        "out_proj.weight": mixer.out.weight,
    }
    other = authors.load(Mamba(20, state_dim=3, conv_size=3, dtype=torch.float64), names)
    assert torch.equal(other(tokens()), mixer(tokens()))


def test_published_sizes():
    mixer = create("mamba", 768, device="meta")
    own = sum(p.numel() for p in mixer.parameters())
    # mamba-130m: 24 layers, each with a norm, a last norm, and 50280 embeddings tied to the output
    assert 24 * (own + 768) + 768 + 50280 * 768 == 129_135_360
    unweighed = {n for n, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert unweighed == {"log_rate", "skip"}


def test_first_values():
    torch.manual_seed(0)
    mixer = create("mamba", 1000, dtype=torch.float64)
    assert_close(mixer.log_rate.exp(), torch.arange(1.0, 17.0, dtype=torch.float64).repeat(2000, 1))
    assert mixer.skip.eq(1).all()
    steps = torch.nn.functional.softplus(mixer.step.bias)
    assert steps.min() >= 0.001 and steps.max() <= 0.1
    assert_close(steps.log().mean().item(), -4.6, atol=0.1, rtol=0.0)  # log(0.001 * 0.1) / 2
    assert_close(mixer.step.weight.abs().max().item(), 63**-0.5, atol=1e-4, rtol=0.0)


def test_bfloat16_keeps_the_state_in_float32():
    mixer = build().bfloat16()
    y, state = mixer(tokens().bfloat16(), state=mixer.init_state(2))
    assert (y.dtype, state.hidden.dtype, state.past.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.door
@pytest.mark.parametrize("name", ["state_dim", "conv_size", "expand"])
def test_errors(name):
    with pytest.raises(ValueError, match=rf"{name} is 0, must be a whole number of at least 1"):
        Mamba(16, **{name: 0})
