"""Rotary position embedding: against complex multiplication, and the identities that make it relative."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.ops.rotary import Yarn, rotary_angles, rotate


def complex_rotation(x, positions, base=10000.0):
    """Channels (2 j, 2 j + 1) as a complex number, times exp(i p base^(-2 j / d)), by loops."""
    out = x.clone()
    d = x.shape[-1]
    for n, p in enumerate(positions):
        for j in range(d // 2):
            turn = torch.exp(1j * torch.tensor(p * base ** (-2 * j / d), dtype=torch.complex128))
            z = torch.complex(x[..., n, 2 * j], x[..., n, 2 * j + 1]) * turn
            out[..., n, 2 * j], out[..., n, 2 * j + 1] = z.real, z.imag
    return out


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_interleaved_is_complex_multiplication(base):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = torch.tensor([0, 1, 4, -2, 300])
    angles = rotary_angles(positions, 8, base=base, dtype=torch.float64)
    ours = rotate(x, angles, pairing="interleaved")
    torch.testing.assert_close(ours, complex_rotation(x, positions.tolist(), base), rtol=1e-12, atol=1e-12)


def test_half_is_interleaved_with_other_channel_order():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    angles = rotary_angles(torch.arange(5), 8, dtype=torch.float64)
    order = torch.arange(8).view(2, 4).T.flatten()  # 0 4 1 5 2 6 3 7: pairs of halves become neighbours
    expected = torch.empty_like(x)
    expected[..., order] = rotate(x[..., order], angles, pairing="interleaved")
    torch.testing.assert_close(rotate(x, angles, pairing="half"), expected)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_products_depend_on_the_distance_alone_and_norms_stay(pairing):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    positions = torch.arange(12)

    def at(x):
        rows = x.expand(1, 1, 12, 16)
        return rotate(rows, rotary_angles(positions, 16, dtype=torch.float64), pairing=pairing)

    scores = (at(q) @ at(k).mT)[0, 0]
    for distance in range(-11, 12):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1
    torch.testing.assert_close(at(q).norm(dim=-1), q.norm(dim=-1).expand(1, 1, 12))


def test_partial_leaves_the_last_channels():
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    angles = rotary_angles(torch.arange(5), 4, dtype=torch.float64)
    for pairing in ("half", "interleaved"):
        ours = rotate(x, angles, pairing=pairing)
        torch.testing.assert_close(ours[..., 4:], x[..., 4:], rtol=0, atol=0)
        torch.testing.assert_close(ours[..., :4], rotate(x[..., :4], angles, pairing=pairing))


def test_positions_of_each_batch_row_hold_for_all_its_heads():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 9, 9, 11, 0]])
    ours = rotate(x, rotary_angles(positions, 8, dtype=torch.float64))
    for row in range(2):
        alone = rotate(x[row], rotary_angles(positions[row], 8, dtype=torch.float64))
        torch.testing.assert_close(ours[row], alone)
    whole = rotary_angles(positions[:, None].expand(2, 3, 5), 8, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, whole), ours)


@pytest.mark.parametrize("axes", [2, 3])
def test_each_axis_turns_its_own_run_of_channels(axes):
    width = 4
    x = torch.randn(1, 2, 6, axes * width, dtype=torch.float64)
    positions = torch.randint(0, 9, (6, axes))
    angles = rotary_angles(positions, axes * width, axes=axes, dtype=torch.float64)
    ours = rotate(x, angles, pairing="interleaved")
    for axis in range(axes):
        run = slice(axis * width, (axis + 1) * width)
        alone = rotary_angles(positions[:, axis], width, dtype=torch.float64)
        torch.testing.assert_close(ours[..., run], rotate(x[..., run], alone, pairing="interleaved"))


def test_cos_and_sin_may_be_given_and_half_precision_keeps_its_dtype():
    x = torch.randn(1, 2, 5, 8)
    angles = rotary_angles(torch.arange(5) + 5000, 8)
    torch.testing.assert_close(rotate(x, (angles.cos(), angles.sin())), rotate(x, angles), rtol=0, atol=0)
    half = rotate(x.bfloat16(), rotary_angles(torch.arange(5) + 5000, 8, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, rotate(x.bfloat16().float(), angles).bfloat16(), rtol=0, atol=0)


def test_gradients():
    x = torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    angles = rotary_angles(torch.arange(3), 4, dtype=torch.float64)
    for pairing in ("half", "interleaved"):
        assert torch.autograd.gradcheck(lambda x, p=pairing: rotate(x, angles, pairing=p), x)


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="dim is 7"):
        rotary_angles(torch.arange(3), 7)
    with pytest.raises(ValueError, match="dim is 6, must be a multiple of 4"):
        rotary_angles(torch.zeros(3, 2), 6, axes=2)
    with pytest.raises(ValueError, match="positions has shape"):
        rotary_angles(torch.zeros(3), 8, axes=2)
    with pytest.raises(ValueError, match="angles has 4 pairs"):
        rotate(torch.zeros(1, 1, 3, 6), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="pairing is 'both'"):
        rotate(torch.zeros(1, 1, 3, 6), torch.zeros(3, 3), pairing="both")


def test_yarn():
    """Pairs with many turns in the original length keep theirs, those with few are stretched in full."""
    yarn = Yarn(4.0, original_length=64, beta_fast=4)
    # 64 / (2 pi 50^(2 j / 8)) turns of pair j: 4 at j = 0.96, 1 at j = 2.37
    torch.testing.assert_close(
        yarn.slowing(8, 50.0), torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.equal(Yarn(1.0).slowing(8, 50.0), torch.ones(4, dtype=torch.float64))
    assert Yarn(4.0).length == pytest.approx(0.1 * math.log(4) + 1) and Yarn(4.0).logit_factor == 1
    deepseek = Yarn(40.0, mscale=0.707, mscale_all_dim=0.707)
    assert deepseek.length == 1
    assert deepseek.logit_factor == pytest.approx((0.0707 * math.log(40) + 1) ** 2)
    with pytest.raises(ValueError, match=r"factor is 0\.5, must be at least 1"):
        Yarn(0.5)
