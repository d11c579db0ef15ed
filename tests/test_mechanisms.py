"""`heedful bench ops --mechanisms`: what is measured, and against what."""

from __future__ import annotations

import pytest
import torch

from heedful.bench import mechanisms
from heedful.bench.choices import parse


def test_ideal_is_held_against_causal_dense_attention():
    dense, window = (
        mechanisms._measure(parse(text)[0], (512,), "cpu")
        for text in ("self-attention", "streaming-llm:sinks=0,window=64")
    )
    assert dense.visited == pytest.approx(1.0)
    # In tiles of 128 each of 4 rows sees its own tile and the one before: 7 tiles of dense attention's 10.
    assert window.visited == pytest.approx(7 / 10)
    assert window.reached == pytest.approx(window.forward_ratio * 7 / 10)
    assert window.mixer == "streaming-llm:sinks=0,window=64"
    assert min(window.forward, window.both, window.dense_forward, window.dense_both) > 0


def test_maps_are_held_against_dense_attention_over_their_tokens():
    half, whole = (
        mechanisms._measure(parse(f"freeswim:native={native}")[0], (2, 16, 16), "cpu")
        for native in ("6x6", "16x16")
    )
    assert whole.visited == pytest.approx(1.0)
    assert half.visited is not None
    assert 7 * 7 / 256 <= half.visited < 1
    assert (half.length, half.size) == (512, (2, 16, 16))
    assert "freeswim" in mechanisms.sparse_grid_mixers(3)


def test_flux_attention_is_measured_sparse():
    mixer = mechanisms.build(parse("flux-attention:block_size=64,local_blocks=2")[0])
    x = torch.randn(1, 1024, mechanisms.DIM)
    full = mechanisms.build(parse("flux-attention:block_size=64,local_blocks=15")[0])
    assert mechanisms._products(lambda: mixer(x)) < mechanisms._products(lambda: full(x))


@pytest.mark.door
def test_only_sequence_mixers_are_measured():
    with pytest.raises(ValueError, match="mixer 'eca' is of kind channel, must be a sequence mixer"):
        next(mechanisms.costs("eca", [(64,)]))
