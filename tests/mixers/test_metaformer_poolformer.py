from __future__ import annotations

import itertools

import pytest
import torch

import heedful
from heedful.mixers.grid.metaformer_poolformer import PoolMixer


def transcription(x: torch.Tensor, pool: int) -> torch.Tensor:
    """Mean over the neighbours that exist, minus the point, one point at a time."""
    side, space = pool // 2, x.shape[2:]
    y = []
    for at in itertools.product(*map(range, space)):
        box = tuple(slice(max(0, i - side), min(s, i + side + 1)) for i, s in zip(at, space, strict=True))
        y.append(x[(..., *box)].flatten(2).mean(-1) - x[(..., *at)])
    return torch.stack(y, -1).view(x.shape)


@pytest.mark.parametrize("space", [(7,), (5, 4), (3, 4, 2), (1, 1)])
@pytest.mark.parametrize("pool", [1, 3, 5])
def test_equals_transcription_with_gradients(space: tuple[int, ...], pool: int) -> None:
    x = torch.randn(2, 3, *space, dtype=torch.float64, requires_grad=True)
    mixer = PoolMixer(3, pool=pool)
    literal = transcription(x, pool)
    torch.testing.assert_close(mixer(x), literal)
    up = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, up)[0] for y in (mixer(x), literal)))


@pytest.mark.parametrize("space", [(6,), (5, 4), (3, 2, 4)])
def test_constant_map_gives_zero_everywhere(space: tuple[int, ...]) -> None:
    y = PoolMixer(2)(torch.full((1, 2, *space), 0.5))
    torch.testing.assert_close(y, torch.zeros_like(y))


def test_has_no_parameters() -> None:
    assert not list(PoolMixer(64).parameters())
    assert not PoolMixer(64).state_dict()


@pytest.mark.parametrize("name", ["metaformer-poolformer", "poolformer", "pool"])
def test_names(name: str) -> None:
    assert isinstance(heedful.create(name, 4), PoolMixer)


@pytest.mark.door
@pytest.mark.parametrize("pool", [0, 2])
def test_pool_must_be_odd(pool: int) -> None:
    with pytest.raises(ValueError, match="pool is"):
        PoolMixer(4, pool=pool)
