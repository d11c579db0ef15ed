"""How far stacks see: against powers of the boolean mask, and the facts of PowerAttention."""

from __future__ import annotations

import math
import time

import matplotlib
import pytest
import torch

import heedful
from heedful import patterns as p
from heedful.inspect import receptive_field
from heedful.patterns.pattern import Pattern

matplotlib.use("agg")


def depths(patterns: list[Pattern], n: int) -> torch.Tensor:
    """The least number of layers from the top, by products of dense masks of the union of heads."""
    reach = torch.eye(n, dtype=torch.bool)
    depth = torch.where(reach, 0, -1)
    for d, pattern in enumerate(reversed(patterns), start=1):
        mask = pattern.mask(n).flatten(0, 1).any(0)
        reach = reach | ((reach.double() @ mask.double()) > 0)
        depth[reach & (depth < 0)] = d
    return depth


@pytest.mark.parametrize(
    "pattern",
    [
        p.Power(1, 0, 1),
        p.Power(2, 1, 16),
        p.Causal() & p.Window(9),
        p.Window(3, 5, dilation=2),
        p.LocalStride(4, 1, 8, 1, 4),
        p.PerHead([p.Causal() & p.Strided(7), p.SinkWindow(2, 3)]),
        p.Documents((100, 150, 50)),
        p.Causal() & p.Documents(((100, 200), (150, 150))),
        ~p.Causal(),
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", [0, 1, 4])
def test_equals_powers_of_the_mask(pattern, layers):
    n = 300
    found = receptive_field(pattern, layers, n)
    expected = depths([pattern] * layers, n)
    assert torch.equal(found.depth.long(), expected)
    assert torch.equal(found.reached, expected >= 0)
    assert found.layers == layers
    assert found.counts.shape == (layers, n)
    for layer in range(1, layers + 1):
        assert torch.equal(found.counts[layer - 1], ((expected >= 0) & (expected <= layer)).sum(1))
    some = receptive_field(pattern, layers, n, queries=[299, 17, 17])
    assert some.queries.tolist() == [17, 299]
    assert torch.equal(some.depth, found.depth[[17, 299]])


def test_stack_of_different_patterns():
    stack = [p.Causal() & p.Blocks(200, 16), p.Causal() & p.Window(4), p.Causal() & p.Window(4)]
    found = receptive_field(stack, 3, 200)
    assert torch.equal(found.depth.long(), depths(stack, 200))
    assert not torch.equal(found.reached, receptive_field(stack[::-1], 3, 200).reached)


def test_power_reaches_distance_x_in_popcount_layers():
    found = receptive_field(p.Power(1, 0, 1), None, 200)
    distance = torch.arange(200)[:, None] - torch.arange(200)
    bits = torch.tensor([[int(x).bit_count() if x >= 0 else -1 for x in row] for row in distance])
    assert torch.equal(found.depth.long(), bits)
    assert found.layers == 7  # popcount(127)
    for d in (1, 2, 3, 4, 5):
        last = receptive_field(p.Power(1, 0, 1), d, 200).reached[-1].flip(0)
        assert last[: 2**d].all()
        assert not last[2 ** (d + 1) - 1]


def test_sliding_window_needs_linearly_many_layers():
    n, w = 130, 9
    found = receptive_field(p.SinkWindow(0, w), None, n)
    assert found.depth[-1].tolist() == [math.ceil(x / (w - 1)) for x in range(n - 1, -1, -1)]
    assert found.layers == math.ceil((n - 1) / (w - 1))


def test_positions_never_reached():
    """A window with step 2 never reaches odd offsets, at any depth; every token of power is reached."""
    found = receptive_field(p.Window(4, 0, dilation=2), None, 101)
    assert found.unreached().tolist() == list(range(1, 100, 2))
    assert found.unreached(50).tolist() == list(range(1, 50, 2))
    assert found.causal
    assert receptive_field(p.Power(1, 0, 1), None, 101).unreached().tolist() == []
    both = receptive_field(p.Window(4, dilation=2), None, 101)
    assert not both.causal
    assert both.unreached(50).tolist() == list(range(1, 101, 2))
    # Dilated segments (tokens 0, 4, 8, ... of segments of 32) leave most tokens out.
    longnet = p.Causal() & p.Blocks(128, 32) & p.Strided(4)
    assert len(receptive_field(longnet, None, 128).unreached()) == 128 - 8
    assert str(receptive_field(longnet, 2, 128)).startswith("2 layers, 128 tokens: the query at 127")


def test_at_65536_tokens():
    """Sampled queries, no n x n buffer."""
    begin = time.perf_counter()
    found = receptive_field(p.Power(), 4, 65536, queries=[100, 40000, 65535])
    assert time.perf_counter() - begin < 20
    assert found.depth.shape == (3, 65536)
    blocks = torch.arange(256)
    distance = 255 - blocks
    # In blocks of 256: a window of 5, powers, and the sink; 4 layers reach every distance of few bits.
    reached = found.reached[-1].view(256, 256)
    for d in distance.tolist():
        if int(d).bit_count() <= 4:
            assert reached[255 - d].all()
    assert len(receptive_field(p.SinkWindow(0, 64), 1, 5000).queries) == 64


def test_plot():
    ax = receptive_field(p.Power(1, 0, 1), 3, 40).plot()
    assert ax.get_xlabel() == "token position"
    assert ax.images[0].get_array().shape == (40, 40)
    matplotlib.pyplot.close(ax.figure)
    assert heedful.inspect.receptive_field is receptive_field


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="layers is -1"):
        receptive_field(p.Causal(), -1, 10)
    with pytest.raises(ValueError, match="layers is 3, must be 2"):
        receptive_field([p.Causal(), p.Causal()], 3, 10)
    with pytest.raises(ValueError, match=r"queries is \[10\]"):
        receptive_field(p.Causal(), 1, 10, queries=[10])
    with pytest.raises(ValueError, match="query is 3, must be one of those followed"):
        receptive_field(p.Causal(), 1, 10, queries=[4]).unreached(3)
