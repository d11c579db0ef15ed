"""Every registered image backbone, and every published configuration."""

from __future__ import annotations

import re

import pytest
import torch

from heedful import models
from heedful.models.backbone import Backbone
from heedful.registry import index
from heedful.testing.check_backbone import CHECKS

FAMILIES = {
    name: entry.load()
    for name, entry in sorted(index().items())
    if entry.kind == "model" and entry.module.startswith("heedful.models.")
}
BACKBONES = {
    name: cls for name, cls in FAMILIES.items() if isinstance(cls, type) and issubclass(cls, Backbone)
}
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}
SIDES = {named.name: named.size for named in models.list()}


@pytest.mark.parametrize("check", sorted(CHECKS))
@pytest.mark.parametrize("family", sorted(BACKBONES))
def test_backbone(family, check):
    if reason := BACKBONES[family].exempt.get(check):
        pytest.skip(reason)
    CHECKS[check](BACKBONES[family])


@pytest.mark.parametrize("name", [named.name for named in models.list()])
def test_published_parameters(name):
    with torch.device("meta"):
        model = models.create(name)
    assert models.parameters(model) == models.find(name).parameters


@pytest.mark.parametrize("name", [named.name for named in models.list() if named.flops])
def test_published_flops(name):
    """Within 2 %, or half a unit of the last published digit."""
    named = models.find(name)
    try:
        counted = count(named, "meta")
    except RuntimeError:  # routing looks at numbers, and some operators do not know the device
        counted = count(named, "cpu")
    number, unit = re.fullmatch(r"([\d.]+)([KMG])", named.flops).groups()
    digit = 10.0 ** -len(number.partition(".")[2])
    wanted = float(number) * UNITS[unit]
    assert abs(counted - wanted) <= max(0.02 * wanted, 0.5 * digit * UNITS[unit]), (
        f"{counted / UNITS[unit]:.4g}"
    )


def count(named, device):
    with torch.device(device):
        model = models.create(named.name)
        return models.multiply_adds(model, torch.zeros(1, model.in_channels, named.size, named.size))
