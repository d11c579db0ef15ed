"""A mixture of heads out of pretrained attention."""

from __future__ import annotations

import pytest
import torch

from heedful.convert import to_moh
from heedful.convert.sites import find_sites
from heedful.mixers.heads.moh_llama import MixtureOfHeadLlamaAttention
from tests.convert.tiny import cache_bytes, check_decodes, check_loads, outcome, texts, tiny


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Bert"])
def test_all_heads_on_change_nothing(kind):
    model = tiny(kind)
    same, report = to_moh(model, shared_heads=3, routed_heads=3)
    torch.testing.assert_close(outcome(same), outcome(model), rtol=1e-5, atol=1e-5)
    assert report.parameters[0] == report.parameters[1]
    assert report.cache_bytes[0] == report.cache_bytes[1]
    assert not torch.allclose(outcome(to_moh(model)[0]), outcome(model), atol=1e-2)


@pytest.mark.parametrize("kv", [6, 2])
def test_equals_the_mixer(kv):
    """The layer computes what the published form does, that is checked against the authors' code."""
    site = find_sites(tiny("Llama", num_key_value_heads=kv))[1]
    mixer = MixtureOfHeadLlamaAttention(48, heads=6, kv_heads=kv, shared_heads=2, routed_heads=1)
    for ours, theirs in (("query", site.query), ("key", site.key), ("value", site.value), ("out", site.out)):
        getattr(mixer, ours).load_state_dict(theirs.state_dict())
    model, _ = to_moh(tiny("Llama", num_key_value_heads=kv), shared_heads=2, routed_heads=1)
    layer, x = model.model.layers[1].self_attn, torch.randn(2, 9, 48)
    layer.train()
    y, _ = layer(x, model.model.rotary_emb(x, torch.arange(9)[None]), None)
    torch.testing.assert_close(y, mixer(x), rtol=1e-4, atol=1e-5)
    share = mixer.aux_losses["load_balance"] / 2  # of two layers
    torch.testing.assert_close(layer.aux_losses["load_balance"], share)
    layer.eval()(x, model.model.rotary_emb(x, torch.arange(9)[None]), None)
    assert layer.aux_losses == {}


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_decodes(kind, tmp_path):
    model, report = to_moh(tiny(kind, num_key_value_heads=2), shared_heads=2, routed_heads=2)
    assert report.cache_bytes == (cache_bytes(model),) * 2
    check_decodes(model, tmp_path)


def test_encoder_loads(tmp_path):
    check_loads(to_moh(tiny("Bert"))[0], tmp_path)


def test_gradients_reach_the_routing():
    """The loss of uneven use moves queries, though the choice itself has no gradient."""
    model, _ = to_moh(tiny("Llama"))
    model.train()(**texts())
    layer = model.model.layers[0].self_attn
    layer.aux_losses["load_balance"].backward()
    routed = layer.q_proj.weight.grad.view(6, 8, 48)
    assert routed[3:].abs().sum() > 0 and routed[:3].abs().sum() == 0


@pytest.mark.door
def test_errors():
    for named, told in (
        ({"shared_heads": 7}, "shared_heads is 7"),
        ({"shared_heads": 2, "routed_heads": 5}, "routed_heads is 5"),
        ({"shared_heads": 2, "routed_heads": 0}, "routed_heads is 0"),
    ):
        with pytest.raises(ValueError, match=told):
            to_moh(tiny("Llama"), copy=False, **named)
