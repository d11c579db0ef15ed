"""Maps of the same kind land in the same cluster, and the autoencoder learns them."""

from __future__ import annotations

import pytest
import torch

from heedful.inspect import embed_patterns
from heedful.inspect.pattern_embedding import MapAutoencoder


def kinds(n=20, each=12):
    """Maps on the diagonal, of vertical stripes, and uniform ones, with noise."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for kind in (
        torch.eye(n),
        torch.zeros(n, n).index_fill(1, torch.tensor([3, 4, 11]), 1.0),
        torch.ones(n, n),
    ):
        for _ in range(each):
            noisy = kind + 0.1 * torch.rand(n, n, generator=generator)
            maps.append(noisy / noisy.sum(1, keepdim=True))
    return torch.stack(maps)


def test_kinds_become_clusters():
    before = torch.get_rng_state()
    found = embed_patterns(kinds(), clusters=3, latent=8, size=16, steps=120)
    assert torch.equal(before, torch.get_rng_state())
    groups = [set(found.cluster[i : i + 12].tolist()) for i in (0, 12, 24)]
    assert all(len(g) == 1 for g in groups) and len(set.union(*groups)) == 3
    untrained = embed_patterns(kinds(), clusters=3, latent=8, size=16, steps=0)
    assert found.error < untrained.error / 5
    assert found.means.shape == (3, 16, 16) and found.places.shape == (36, 2)
    centred = found.codes - found.codes.mean(0)
    values = torch.linalg.svdvals(centred)
    torch.testing.assert_close(found.places.norm(dim=0), values[:2], rtol=1e-4, atol=1e-4)  # float32


def test_autoencoder():
    model = MapAutoencoder(size=32, latent=5)
    x = model.prepare(torch.rand(3, 14, 14))
    assert x.shape == model(x).shape == (3, 1, 32, 32)
    down = sum(9 * a * b + b for a, b in ((1, 16), (16, 32), (32, 64), (64, 64)))
    up = sum(16 * b * a + a for a, b in ((1, 16), (16, 32), (32, 64), (64, 64)))
    code = 64 * 4 * 5 + 5 + 5 * 64 * 4 + 64 * 4
    assert sum(p.numel() for p in model.parameters()) == down + up + code


@pytest.mark.door
def test_doors():
    with pytest.raises(ValueError, match="clusters is 9, must be at most"):
        embed_patterns(torch.rand(8, 4, 4), clusters=9)
    with pytest.raises(ValueError, match="size is 20, must be a multiple of 16"):
        MapAutoencoder(size=20)
