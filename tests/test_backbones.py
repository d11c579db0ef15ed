"""Every registered image backbone, and every published configuration."""

from __future__ import annotations

import inspect
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

# Where published multiply-adds are no count of products and convolutions: what is counted, and why.
SOFTMAX = "published without the products of attention"
SCANS = "published with norms, steps of scans and interpolation"
COUNTED = {
    "a2mamba_base": ("11.3G", "published for another base than the released one"),
    "gcvit_xtiny": ("2.91G", SOFTMAX),
    "gcvit_tiny2": ("6.18G", SOFTMAX),
    "gcvit_small2": ("11.5G", SOFTMAX),
    "mambaout_femto": ("1.148G", "published with norms"),
    "msvmamba_nano": ("0.844G", SCANS),
    "msvmamba_micro": ("1.48G", SCANS),
    "msvmamba_tiny": ("4.51G", SCANS),
    "ravlt_tiny": ("2.61G", SOFTMAX),
    "ravlt_small": ("4.88G", SOFTMAX),
    "ravlt_base": ("10.6G", SOFTMAX),
    "ravlt_large": ("17.2G", SOFTMAX),
    "spectformer_h_small": ("4.07G", SOFTMAX),
    "spectformer_h_base": ("6.61G", SOFTMAX),
    "spectformer_h_large": ("13.2G", SOFTMAX),
    "transnext_micro": ("2.63G", "published with products that are made place by place of a window"),
}


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
    """Within 2 %, or half a unit of the last published digit; else as is said in COUNTED, and no nearer."""
    named = models.find(name)
    try:
        counted = count(named, "meta")
    except RuntimeError:  # routing looks at numbers, and some operators do not know the device
        counted = count(named, "cpu")
    if name in COUNTED:
        assert not near(counted, named.flops)
    wanted, _ = COUNTED.get(name, (named.flops, ""))
    assert near(counted, wanted), f"{counted:.4g}"


def near(counted, told):
    number, unit = re.fullmatch(r"([\d.]+)([KMG])", told).groups()
    wanted, digit = float(number), 10.0 ** -len(number.partition(".")[2])
    return abs(counted / UNITS[unit] - wanted) <= max(0.02 * wanted, 0.5 * digit)


def count(named, device):
    with torch.device(device):
        model = models.create(named.name)
        return models.multiply_adds(model, torch.zeros(1, model.in_channels, named.size, named.size))


def _lists(cls):
    """The arguments that give each stage something."""
    defaults = {name: x.default for name, x in inspect.signature(cls).parameters.items()}
    found = {name: value for name, value in defaults.items() if isinstance(value, tuple)}
    stages = len(found.get("depths", ()))
    return [name for name, value in found.items() if stages > 1 and len(value) == stages]


@pytest.mark.door
@pytest.mark.parametrize("family", [name for name in FAMILIES if len(_lists(FAMILIES[name])) > 1])
def test_each_stage_has_an_entry(family):
    cls = FAMILIES[family]
    for name in _lists(cls):
        default = inspect.signature(cls).parameters[name].default
        for wrong in (default[:-1], (*default, default[-1])):
            with pytest.raises(ValueError, match="one for each stage"):
                cls(**{**cls.example, name: wrong})
