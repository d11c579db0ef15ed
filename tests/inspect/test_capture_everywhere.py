"""Capture against what modules compute: every mixer of heedful; and 32k tokens without a table."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import heedful
from heedful.inspect import Site, capture
from heedful.inspect.views import Tables
from heedful.ops.observe import change
from heedful.registry import index
from tests.inspect.test_capture import largest
from tests.inspect.test_report import sample_of


def test_every_mixer_of_heedful():
    """Captured weights times values are what heedful.attention gave, call by call."""
    seen = 0
    for entry in index().values():
        if not entry.is_mixer or entry.name == "dhsa":  # which calls torch's attention too
            continue
        torch.manual_seed(0)
        made = entry.load()
        mixer = made(**made.example).double().eval()
        inputs = {
            key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for key, x in mixer.example_inputs().items()
        }
        found, outs = [], []

        def keep(call, out, outs=outs):
            outs.append(out)
            return out

        def see(site, found=found):
            found.append(site.mix(site.weights()))

        with torch.no_grad(), change(keep):
            if not (mixer(**inputs) is not None and outs):
                continue
            outs.clear()
            with capture(mixer, see):
                mixer(**inputs)
        assert len(found) == len(outs), entry.name
        torch.testing.assert_close(found, outs, rtol=1e-9, atol=1e-9, msg=entry.name)  # float64
        seen += 1
    assert seen > 60


@pytest.mark.parametrize("kind", ["timm", "torch", "heedful"])
def test_long_inputs_in_bounded_memory(kind):
    torch.manual_seed(0)
    n = 32768  # a table has 2^30 entries
    module: nn.Module
    if kind == "timm":
        module = timm.layers.Attention(4, num_heads=1)
    elif kind == "torch":
        module = nn.MultiheadAttention(4, 1, batch_first=True)
    else:
        module = heedful.create("self-attention", 4, heads=1, causal=True)
    x = torch.randn(1, n, 4)
    tables = Tables(sample_of(n))
    sums = []

    def see(site: Site) -> None:
        tables(site)
        pieces = [*site.pieces()]
        assert pieces[0].start == 0 and pieces[-1].stop == n
        for rows in pieces[:: len(pieces) // 3]:
            sums.append(site.weights(rows).sum(-1))

    with torch.no_grad(), largest() as most, capture(module.eval(), see):
        module(x, x, x, need_weights=False) if kind == "torch" else module(x)
    assert most.most <= 1 << 23 and len(sums) >= 3
    torch.testing.assert_close(torch.cat(sums, 2), torch.ones(1, 1, sum(s.shape[2] for s in sums)))
