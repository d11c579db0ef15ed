"""Context-aware saliency against loops, and on pictures where the answer is plain."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import nn

from heedful import inspect as look

cas = importlib.import_module("heedful.inspect.context_aware_saliency")  # not the function of that name


def test_colours():
    known = {
        (1.0, 1, 1): (100, 0, 0),
        (1.0, 0, 0): (53.24, 80.09, 67.20),
        (0.0, 0, 1): (32.3, 79.19, -107.86),
    }
    for rgb, wanted in known.items():
        found = cas.lab(torch.tensor(rgb).view(3, 1, 1)).flatten()
        torch.testing.assert_close(found, torch.tensor(wanted).float(), rtol=0, atol=0.03)
    assert cas.lab(torch.zeros(3, 1, 1)).abs().max() < 1e-4


def test_patches_that_stand_out_by_loops(monkeypatch):
    monkeypatch.setattr(cas, "NEIGHBOURS", 5)
    torch.manual_seed(0)
    big, small = torch.rand(3, 19, 25) * 100, torch.rand(3, 10, 13) * 100
    tables = [cas._patches(x) for x in (big, small)]
    assert tables[0][2] == (5, 7) and tables[1][2] == (2, 3)
    found = cas._standing_out(tables[0][:2], [t[:2] for t in tables]).view(5, 7)

    def patches(x):
        height, width = x.shape[1:]
        for i in range(0, height - 6, 3):
            for j in range(0, width - 6, 3):
                longer = max(height, width)
                yield x[:, i : i + 7, j : j + 7], ((i + 3.5) / longer, (j + 3.5) / longer)

    everything = [*patches(big), *patches(small)]
    for number in (0, 9, 34):
        own, (y, x) = everything[number]
        d = []
        for other, (v, u) in everything:
            colour = math.sqrt(((own - other) ** 2).sum().item()) / 700  # 1 from black to white
            d.append(colour / (1 + 3 * math.hypot(y - v, x - u)))
        wanted = 1 - math.exp(-sum(sorted(d)[:5]) / 5)
        assert found.flatten()[number].item() == pytest.approx(wanted, abs=2e-4)  # float32 differences


def test_foci_and_spreading():
    s = torch.zeros(6, 10)
    s[1, 2], s[4, 9], s[5, 0] = 0.9, 0.85, 0.7
    weight = cas._attended(s)
    for y in range(6):
        for x in range(10):
            near = min(math.hypot(y - 1, x - 2), math.hypot(y - 4, x - 9))
            assert weight[y, x].item() == pytest.approx(1 - near / 10, abs=1e-5)
    assert (cas._attended(torch.zeros(3, 3)) == 1).all()
    # A plane on the patches' middles is that plane on the pixels between them.
    table = (torch.arange(5.0) * 3 + 3)[:, None] * 10 + torch.arange(7.0) * 3 + 3
    pixels = cas._spread(table, 1.0, (19, 25))
    wanted = torch.arange(19.0)[:, None] * 10 + torch.arange(25.0)
    torch.testing.assert_close(pixels[3:16, 3:22], wanted[3:16, 3:22], rtol=1e-4, atol=1e-3)


def test_the_odd_square_stands_out():
    torch.manual_seed(0)
    picture = 0.5 + 0.05 * torch.rand(3, 60, 80)
    picture[:, 20:30, 50:60] = torch.tensor([1.0, 0, 0])[:, None, None]
    found = look.context_aware_saliency(picture, side=64)
    assert found.shape == (60, 80) and found.min() >= 0 and found.max() <= 1
    top = divmod(int(found.argmax()), 80)
    assert 17 <= top[0] <= 32 and 47 <= top[1] <= 62
    assert found[20:30, 50:60].mean() > 4 * found.mean()
    flat = look.context_aware_saliency(torch.full((3, 40, 40), 0.3), side=40)
    assert flat.max() < 1e-3


def test_salient_relevance_of_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(900, 3))
    _, relevance = look.lrp_cnn(net, torch.rand(1, 3, 32, 32))
    found = look.salient_relevance_map(relevance[0], side=48)
    heat = relevance[0].abs()
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    torch.testing.assert_close(found, look.context_aware_saliency(heat, side=48))


@pytest.mark.door
def test_errors_at_the_door():
    with pytest.raises(ValueError, match="the picture becomes 4 x 30 pixels"):
        look.context_aware_saliency(torch.zeros(3, 10, 80), side=30)
