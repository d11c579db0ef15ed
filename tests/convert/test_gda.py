"""Signal heads grown without a change of the function."""

from __future__ import annotations

import pytest
import torch

from heedful.convert import grow_mixer, grow_signal_heads
from heedful.mixers.heads.grouped_differential_attention import GroupedDifferentialAttention
from tests.convert.tiny import cache_bytes, check_decodes, outcome, tiny

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 48}


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_growth_changes_nothing(times, bias, tmp_path):
    model = tiny("DiffLlama", **SHAPE, attention_bias=bias)
    grown, report = grow_signal_heads(model, times=times)
    torch.testing.assert_close(outcome(grown), outcome(model), rtol=1e-4, atol=1e-4)
    attention = grown.model.layers[0].self_attn
    assert attention.q_proj.out_features == (2 * times + 2) * 12
    assert attention.o_proj.in_features == 2 * times * 2 * 12
    assert report.cache_bytes == (cache_bytes(model), cache_bytes(grown))
    check_decodes(grown, tmp_path)


def test_jitter_tells_copies_apart():
    model = tiny("DiffLlama", **SHAPE)
    torch.manual_seed(1)
    grown, _ = grow_signal_heads(model, times=2, jitter=0.01)
    one, two = grown.model.layers[0].self_attn.q_proj.weight.view(6, 12, 48)[:2]
    relative = (one - two).std() / model.model.layers[0].self_attn.q_proj.weight.std()
    assert 0.01 < relative < 0.02  # two deviations of 0.01, independent
    torch.testing.assert_close(outcome(grown), outcome(model), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_growth_of_a_mixer(bias):
    torch.manual_seed(0)
    mixer = GroupedDifferentialAttention(
        24, heads=8, noise_heads=2, kv_heads=4, head_dim=6, qkv_bias=bias, dtype=torch.float64
    )
    torch.nn.init.normal_(mixer.norm.weight)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    grown = grow_mixer(mixer, times=2)
    assert (grown.heads, grown.noise_heads, grown.ratio) == (14, 2, 6)
    torch.testing.assert_close(grown(x), mixer(x))
    torch.testing.assert_close(grow_mixer(mixer, times=1)(x), mixer(x))


def test_the_layer_is_the_mixer():
    """DiffLlama's layout in halves, grown, against the mixer's stripes with the same weights."""
    model = tiny("DiffLlama", **SHAPE)
    grown, _ = grow_signal_heads(model, times=3, jitter=0.5)
    layer = grown.model.layers[1].self_attn
    mixer = GroupedDifferentialAttention(
        48, heads=8, noise_heads=2, kv_heads=2, head_dim=12, lambda_init=layer.lambda_init, norm_eps=1e-6
    )
    mixer.norm = torch.nn.RMSNorm(24, eps=layer.groupnorm.eps)
    query = layer.q_proj.weight.view(8, 12, 48)
    stripes = torch.cat([query[:6].unflatten(0, (2, 3)), query[6:, None]], dim=1)
    # Both layouts have one pair of key and value heads here: k1, v1 and k2, v2.
    mixer.load_state_dict(
        {
            "query.weight": stripes.flatten(0, 2),
            "key.weight": layer.k_proj.weight,
            "value.weight": layer.v_proj.weight,
            "out.weight": layer.o_proj.weight,
            "norm.weight": torch.ones(24),
            **{f"lambda_{n}": getattr(layer, f"lambda_{n}") for n in ("q1", "k1", "q2", "k2")},
        }
    )
    x = torch.randn(2, 9, 48)
    y, _ = layer(x, grown.model.rotary_emb(x, torch.arange(9)[None]), None)
    torch.testing.assert_close(y, mixer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="times is 0"):
        grow_signal_heads(tiny("DiffLlama", **SHAPE), times=0)
    with pytest.raises(ValueError, match="jitter is -1"):
        grow_signal_heads(tiny("DiffLlama", **SHAPE), times=2, jitter=-1.0)
    with pytest.raises(ValueError, match="model is of type 'llama', must be one of diffllama"):
        grow_signal_heads(tiny("Llama"), times=2)
