from __future__ import annotations

import itertools
import math

import pytest
import torch

from heedful.mixers.pooling.ggem import GGeMPool


def transcription(
    x: torch.Tensor, power: torch.Tensor, *, eps: float = 1e-6, negative: str = "clamp"
) -> torch.Tensor:
    """The equation, one channel of one row at a time, without logarithms."""
    _, n, channels = x.shape
    rows = []
    for row in x:
        for c in range(channels):
            p, a = power[c // (channels // len(power))], row[:, c]
            if negative == "clamp":
                rows.append((sum(v.clamp(min=eps) ** p for v in a) / n) ** (1 / p))
            elif negative == "shift":
                low = a.min().clamp(max=0)
                rows.append((sum((v - low).clamp(min=eps) ** p for v in a) / n) ** (1 / p) + low)
            else:
                s = sum(v.sign() * v.abs().clamp(min=eps) ** p for v in a) / n
                rows.append(s.sign() * s.abs() ** (1 / p))
    return torch.stack(rows).view(len(x), channels)


@pytest.mark.parametrize("negative", ["clamp", "shift", "signed"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_equals_transcription_with_gradients(groups: int, negative: str) -> None:
    generator = torch.Generator().manual_seed(groups)
    x = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    pool = GGeMPool(6, groups=groups, negative=negative, dtype=torch.float64)
    with torch.no_grad():
        pool.power.copy_(torch.linspace(0.7, 3.5, groups))
    literal = transcription(x, pool.power, negative=negative)
    torch.testing.assert_close(pool(x), literal)
    up = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(pool(x), (x, pool.power), up),
        torch.autograd.grad(literal, (x, pool.power), up),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("negative", ["clamp", "shift", "signed"])
def test_gradcheck(negative: str) -> None:
    x = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    pool = GGeMPool(4, groups=2, negative=negative, dtype=torch.float64)
    assert torch.autograd.gradcheck(pool, (x,))


def test_power_one_is_the_mean() -> None:
    x = torch.rand(2, 9, 8) + 0.1
    torch.testing.assert_close(GGeMPool(8, power=1.0)(x), x.mean(1))


def test_large_power_nears_the_maximum() -> None:
    x = torch.rand(2, 9, 8) + 0.1
    y = GGeMPool(8, power=64.0)(x)
    top = x.amax(1)
    assert (y <= top).all()
    assert (y >= top * 9 ** (-1 / 64) - 1e-6).all()


def test_grows_with_the_power() -> None:
    x = torch.rand(2, 9, 8) + 0.1
    means = [GGeMPool(8, power=p)(x) for p in (0.5, 1.0, 2.0, 3.0, 8.0)]
    assert all((low < high).all() for low, high in itertools.pairwise(means))


@pytest.mark.parametrize("negative", ["shift", "signed"])
def test_scales_with_x(negative: str) -> None:
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    pool = GGeMPool(8, negative=negative, dtype=torch.float64, eps=1e-12)
    torch.testing.assert_close(pool(2.5 * x), 2.5 * pool(x))


def test_positive_x_is_the_same_for_every_treatment_of_negatives() -> None:
    x = torch.rand(2, 9, 8) + 0.1
    torch.testing.assert_close(GGeMPool(8, negative="shift")(x), GGeMPool(8)(x))
    torch.testing.assert_close(GGeMPool(8, negative="signed")(x), GGeMPool(8)(x))
    torch.testing.assert_close(GGeMPool(8)(2.5 * x), 2.5 * GGeMPool(8)(x))


def test_signed_is_odd() -> None:
    x = torch.randn(2, 9, 8)
    pool = GGeMPool(8, negative="signed")
    torch.testing.assert_close(pool(-x), -pool(x))
    assert pool(torch.zeros(1, 3, 8)).eq(0).all()


@pytest.mark.parametrize("negative", ["clamp", "shift", "signed"])
def test_mask_leaves_tokens_out(negative: str) -> None:
    x = torch.randn(2, 7, 8)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]).bool()
    spoilt = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
    pool = GGeMPool(8, negative=negative)
    y = pool(spoilt, mask=mask)
    torch.testing.assert_close(y[:1], pool(x[:1, [0, 1, 3]]))
    torch.testing.assert_close(y[1:], pool(x[1:, :6]))
    y.sum().backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert spoilt.grad[~mask].eq(0).all()
    assert pool.power.grad is not None
    assert pool.power.grad.isfinite().all()


@pytest.mark.parametrize("negative", ["clamp", "shift", "signed"])
def test_row_without_tokens_gives_zeros(negative: str) -> None:
    x = torch.randn(2, 4, 8, requires_grad=True)
    pool = GGeMPool(8, negative=negative)
    y = pool(x, mask=torch.tensor([[False] * 4, [True] * 4]))
    assert y[0].eq(0).all()
    torch.testing.assert_close(y[1:], pool(x[1:]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert pool.power.grad is not None
    assert pool.power.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.rand(2, 50, 8) * 60 + 1).to(dtype)  # 60^3 is more than float16 holds
    pool = GGeMPool(8, dtype=dtype)
    torch.testing.assert_close(pool(x), transcription(x.double(), torch.full((8,), 3.0).double()).to(dtype))


def test_extreme_activations_stay_finite() -> None:
    x = torch.tensor([1e-20, 1e20]).view(1, 2, 1).requires_grad_()
    pool = GGeMPool(1, groups=1, power=5.0)  # 1e100 is more than float32 holds
    y = pool(x)
    torch.testing.assert_close(y, torch.tensor([[1e20 * 0.5**0.2]]), rtol=1e-5, atol=0)
    y.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert pool.power.grad is not None
    assert pool.power.grad.isfinite().all()


def test_parameters() -> None:
    assert [tuple(p.shape) for p in GGeMPool(64, groups=8).parameters()] == [(8,)]
    assert not any(p.requires_grad for p in GGeMPool(64, learnable=False).parameters())


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="groups is 3"):
        GGeMPool(8, groups=3)
    with pytest.raises(ValueError, match="power is 0"):
        GGeMPool(8, power=0.0)
    with pytest.raises(ValueError, match="eps is -1"):
        GGeMPool(8, eps=-1.0)
    with pytest.raises(ValueError, match="negative is 'abs'"):
        GGeMPool(8, negative="abs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 token"):
        GGeMPool(8)(torch.zeros(2, 0, 8))
    with pytest.raises(ValueError, match="mask has shape"):
        GGeMPool(8)(torch.zeros(2, 3, 8), mask=torch.ones(2, 4).bool())
