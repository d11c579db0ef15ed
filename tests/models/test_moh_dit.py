"""MoH-DiT: its equations, number by number where it is not a mixer's, and its start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from heedful.models.moh_dit import MoHDiT, sine_cosine, time_embedding


def make(**options):
    torch.manual_seed(0)
    model = MoHDiT(**{**MoHDiT.example, **options}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def normed(z, shift, scale):
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return z * (1 + scale) + shift


def literal(model, x, time, label):
    """One image."""
    p, grid = model.patch, model.size // model.patch
    tokens = []
    for i in range(grid):
        for j in range(grid):
            piece = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            tokens.append((model.embed.weight * piece).sum((1, 2, 3)) + model.embed.bias)
    tokens = torch.stack(tokens) + model.positions[0]
    angles = [float(time) * 10000 ** (-k / 128) for k in range(128)]
    wave = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=x.dtype)
    first, _, second = model.time
    inner = first.weight @ wave + first.bias
    c = second.weight @ (inner * inner.sigmoid()) + second.bias + model.labels.weight[label]
    for block in model.blocks:
        s1, c1, g1, s2, c2, g2 = (block.condition.weight @ (c * c.sigmoid()) + block.condition.bias).split(16)
        tokens = tokens + g1 * block.attention(normed(tokens, s1, c1)[None])[0]
        inner = normed(tokens, s2, c2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        inner = 0.5 * inner * (1 + (math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)).tanh())
        tokens = tokens + g2 * (inner @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    shift, scale = (model.condition.weight @ (c * c.sigmoid()) + model.condition.bias).split(16)
    out = normed(tokens, shift, scale) @ model.out.weight.T + model.out.bias
    y = torch.zeros(model.out_channels, model.size, model.size, dtype=x.dtype)
    for number, values in enumerate(out):
        i, j = divmod(number, grid)
        for place, value in enumerate(values):
            u, rest = divmod(place, p * model.out_channels)
            v, channel = divmod(rest, model.out_channels)
            y[channel, i * p + u, j * p + v] = value
    return y


def test_equals_its_equations():
    model = make()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    time, labels = torch.tensor([0.7, 211.0], dtype=torch.float64), torch.tensor([4, 1])
    expected = torch.stack([literal(model, *each) for each in zip(x, time, labels, strict=True)])
    torch.testing.assert_close(model(x, time, labels), expected)


def test_positions():
    table = sine_cosine(3, 8)
    for row in range(3):
        for column in range(3):
            waves = [
                f(place / 10000 ** (k / 2))
                for place in (column, row)
                for f in (math.sin, math.cos)
                for k in (0, 1)
            ]
            torch.testing.assert_close(table[3 * row + column], torch.tensor(waves, dtype=torch.float64))


def test_starts_with_blocks_that_do_nothing():
    model = MoHDiT(**MoHDiT.example)
    x = torch.randn(1, 16, 16)
    torch.testing.assert_close(model.blocks[0](x, torch.randn(1, 16)), x)
    inputs = model.example_inputs()
    assert model(**inputs).shape == (2, 8, 8, 8)
    assert not model(**inputs).any()
    assert not model.positions.requires_grad


def test_losses_are_a_hundredth_of_their_mean():
    model = make(shared_heads=((1, 2),), routed_heads=((1, 1), (2, 1))).train()
    model(**{n: v.double() if v.is_floating_point() else v for n, v in model.example_inputs().items()})
    losses = [block.attention.aux_losses["load_balance"] for block in model.blocks]
    assert [block.attention.load_balance for block in model.blocks] == [0.005, 0.005]
    # A head that alone is left to choose is always on with probability 1, and its loss is 1.
    torch.testing.assert_close(losses[0], torch.tensor(0.005, dtype=torch.float64))


def test_labels_are_dropped_in_training_alone():
    model = make(class_dropout=0.5).train()
    labels = torch.arange(4).repeat(50)
    torch.manual_seed(1)
    seen = model._dropped(labels)
    changed = seen != labels
    assert 60 < changed.sum() < 140  # of 200, more than five deviations
    assert (seen[changed] == 5).all()
    assert torch.equal(model.eval()._dropped(labels), labels)


def test_time_embedding_is_exact_in_float64():
    got = time_embedding(torch.tensor([999.0], dtype=torch.float64))
    torch.testing.assert_close(
        got[0, 1], torch.tensor(math.cos(999 * 10000 ** (-1 / 128)), dtype=torch.float64)
    )
    assert F.mse_loss(got[:, :128] ** 2 + got[:, 128:] ** 2, torch.ones(1, 128).double()) < 1e-28


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="must be for as many"):
        make(heads=((2, 3),))
    with pytest.raises(ValueError, match="patch is 3, must divide size"):
        make(patch=3)
    model = make()
    with pytest.raises(ValueError, match="must be 8 by 8 pixels"):
        model(torch.zeros(1, 4, 8, 6).double(), torch.zeros(1).double(), torch.zeros(1, dtype=torch.long))
