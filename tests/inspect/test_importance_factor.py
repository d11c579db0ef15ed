"""The importance factor: sample by sample in plain numbers, with padding and along an axis."""

from __future__ import annotations

import pytest
import torch

from heedful.inspect import importance_factor


def literal(samples):
    """Min-max of each sample's numbers, then the mean over samples."""
    scaled = []
    for sample in samples:
        low, high = min(sample), max(sample)
        scaled.append([(w - low) / (high - low) for w in sample])
    return [sum(column) / len(samples) for column in zip(*scaled, strict=True)]


def test_equals_the_formula():
    weights = torch.rand(5, 7, dtype=torch.float64)
    expected = torch.tensor(literal(weights.tolist()), dtype=torch.float64)
    torch.testing.assert_close(importance_factor(weights), expected)
    # A scale and a shift of each sample do not matter.
    torch.testing.assert_close(importance_factor(weights * torch.arange(1, 6)[:, None] + 3), expected)


def test_an_axis_is_the_mean_over_the_others():
    weights = torch.rand(4, 3, 5, dtype=torch.float64)
    whole = importance_factor(weights)
    expected = torch.tensor(literal(weights.flatten(1).tolist()), dtype=torch.float64).view(3, 5)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(importance_factor(weights, axis=1), expected.mean(1))
    torch.testing.assert_close(importance_factor(weights, axis=2), expected.mean(0))


def test_padding_does_not_count():
    weights = torch.rand(2, 6, dtype=torch.float64)
    shown = torch.ones(2, 6, dtype=torch.bool)
    shown[:, 4:] = False
    weights[:, 4:] = torch.tensor([9.0, -9.0])
    got = importance_factor(weights, shown=shown)
    torch.testing.assert_close(got[:4], importance_factor(weights[:, :4]))
    assert not got[4:].any()


def test_equal_weights_have_factor_0():
    assert torch.equal(importance_factor(torch.full((2, 3), 0.5)), torch.zeros(3))


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match=r"weights has shape \(0, 3\)"):
        importance_factor(torch.rand(0, 3))
    with pytest.raises(ValueError, match="axis is 2, must be one of 1 to 1"):
        importance_factor(torch.rand(2, 3), axis=2)
    with pytest.raises(ValueError, match=r"shown has shape \(2, 2\), must be \(2, 3\)"):
        importance_factor(torch.rand(2, 3), shown=torch.ones(2, 2, dtype=torch.bool))
