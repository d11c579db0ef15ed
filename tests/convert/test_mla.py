"""Latent attention out of multi-head and grouped-query attention."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from heedful.convert import to_mla
from heedful.convert.mla import channel_order
from heedful.convert.sites import find_sites
from tests.convert.tiny import cache_bytes, check_decodes, check_loads, outcome, tiny

FULL = {"kv_rank": 999, "query_rank": 999, "multiple": 1}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_full_rank_without_lost_positions_changes_nothing(kind, tmp_path):
    """One KV head whose whole key is turned as before: biases of all kinds, and the scale, matter."""
    model = tiny(kind, num_key_value_heads=1, **({"attention_bias": True} if kind == "Llama" else {}))
    same, report = to_mla(model, **FULL, rotary="fastest", rope_dim=8, nope_dim=0)
    torch.testing.assert_close(outcome(same), outcome(model), rtol=1e-4, atol=1e-4)
    assert report.cache_bytes == (cache_bytes(model), cache_bytes(same))
    check_decodes(same, tmp_path)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_full_rank_of_an_encoder_changes_nothing(kind, tmp_path):
    model = tiny(kind)
    same, report = to_mla(model, **FULL)
    torch.testing.assert_close(outcome(same), outcome(model), rtol=1e-4, atol=1e-4)
    assert report.cache_bytes == (0, 0)
    check_loads(same, tmp_path)
    less, _ = to_mla(model, kv_rank=16, query_rank=16)
    assert not torch.allclose(outcome(less), outcome(model), atol=1e-2)


@pytest.mark.parametrize("rotary", ["published", "fastest"])
@pytest.mark.parametrize("kv", [6, 2])
def test_decodes_from_latents_and_rotary_keys(rotary, kv, tmp_path):
    """Absorbed steps equal the expanded pass; the cache is as large as the report says."""
    model = tiny("Qwen2", num_key_value_heads=kv)
    new, report = to_mla(model, kv_rank=16, query_rank=24, rope_dim=4, rotary=rotary)
    assert cache_bytes(new) == 2 * (16 + 4) * 4 == report.cache_bytes[1]
    assert report.cache_bytes[0] == cache_bytes(model)
    check_decodes(new, tmp_path)


def test_positions_matter_and_only_differences_do():
    """The turned channels know where tokens are; a shift of all positions changes nothing."""
    new, _ = to_mla(tiny("Llama"), kv_rank=24)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        here, there, spread = (
            new(input_ids=ids, position_ids=torch.arange(9)[None] * step + by).logits
            for step, by in ((1, 0), (1, 50), (3, 0))
        )
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(here, spread, atol=1e-2)


@pytest.mark.parametrize("rotary", ["published", "fastest"])
def test_error_is_that_of_the_dropped_singular_values(rotary):
    model = tiny("Llama", num_key_value_heads=2)
    new, _ = to_mla(model, kv_rank=16, query_rank=24, rotary=rotary, multiple=1)
    order = channel_order(8, 4, rotary)
    for site, layer in zip(find_sites(model), new.model.layers, strict=True):
        own = layer.self_attn
        query = site.query.weight.view(6, 8, 48)[:, order].reshape(48, 48)
        error = (own.q_b_proj.weight @ own.q_a_proj.weight - query).square().sum()
        dropped = torch.linalg.svdvals(query)[24:].square().sum()
        torch.testing.assert_close(error, dropped, rtol=1e-3, atol=1e-5)
        # Keys and values together; of the keys the rows that are turned are not there.
        keys, values = (
            w.view(2, 8, 48).repeat_interleave(3, 0) for w in (site.key.weight, site.value.weight)
        )
        both = torch.cat([keys[:, order].reshape(48, 48), values.reshape(48, 48)])
        u, s, vt = torch.linalg.svd(both, full_matrices=False)
        low = (u[:, :16] * s[:16]) @ vt[:16]
        torch.testing.assert_close((low - both).square().sum(), s[16:].square().sum(), rtol=1e-3, atol=1e-5)
        made = (own.kv_b_proj.weight @ own.kv_a_proj.weight[:16]).view(6, 4 + 8, 48)
        torch.testing.assert_close(made[:, :4], low[:48].view(6, 8, 48)[:, :4], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(made[:, 4:], low[48:].view(6, 8, 48), rtol=1e-3, atol=1e-4)
        shared = site.key.weight.view(2, 8, 48)[:, order][:, 4:].mean(0)
        torch.testing.assert_close(own.kv_a_proj.weight[16:], shared)


def test_published_frequencies():
    """Theta ** (-2 j / rope_dim), over the channels that are turned."""
    new, _ = to_mla(tiny("Llama"), kv_rank=16)
    angle = torch.arange(9.0)[:, None] * 10000.0 ** (-torch.arange(4.0) / 4)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    wanted = torch.arange(9.0)[:, None] * 10000.0 ** (-2 * torch.arange(2.0) / 4)
    got = new.model.layers[0].self_attn.angles_of(cos, sin)
    torch.testing.assert_close(got, (wanted.cos(), wanted.sin()))


def test_ranks_by_energy(tmp_path):
    model = tiny("Llama")
    new, report = to_mla(model, kv_energy=0.8, query_energy=0.6, multiple=4)
    for site, layer in zip(find_sites(model), new.model.layers, strict=True):
        s = torch.linalg.svdvals(torch.cat([site.key.weight, site.value.weight])).square()
        rank = int((s.cumsum(0) / s.sum() <= 0.8).sum())
        assert layer.self_attn.kv_rank == -(-rank // 4) * 4
    assert report.cache_bytes[1] == cache_bytes(new)
    check_loads(new, tmp_path)


def test_multiply_adds_of_a_decoding_step():
    """The report's number against PyTorch's counter, for one token behind 15."""
    model = tiny("Llama")
    for made in (model, to_mla(model, kv_rank=16, query_rank=24)[0]):
        made.set_attn_implementation("eager")
        attention, context = made.model.layers[0].self_attn, 16
        cache = DynamicCache()
        x = torch.randn(1, context, 48)
        cos, sin = made.model.rotary_emb(x, torch.arange(context)[None])
        with torch.no_grad():
            attention(
                hidden_states=x[:, :-1],
                position_embeddings=(cos[:, :-1], sin[:, :-1]),
                attention_mask=None,
                past_key_values=cache,
            )
            with FlopCounterMode(display=False) as counter:
                attention(
                    hidden_states=x[:, -1:],
                    position_embeddings=(cos[:, -1:], sin[:, -1:]),
                    attention_mask=None,
                    past_key_values=cache,
                )
        told = to_mla(model, kv_rank=16, query_rank=24, context=context)[1].changes[0]
        cost = told.before if made is model else told.after
        assert counter.get_total_flops() // 2 == cost.multiply_adds


def test_some_layers_and_in_place():
    model = tiny("Llama", num_hidden_layers=3)
    same, report = to_mla(model, kv_rank=16, layers=[1], copy=False)
    assert same is model and [c.module for c in report.changes] == ["model.layers.1.self_attn"]
    assert model.config.heedful_converted.keys() == {"1"}
    assert torch.isfinite(outcome(model)).all()


@pytest.mark.door
def test_errors_leave_the_model_alone():
    model = tiny("Llama")
    for named, told in (
        ({}, "kv_rank is None and kv_energy is None"),
        ({"kv_rank": 8, "kv_energy": 0.5}, "exactly one must be given"),
        ({"kv_rank": 8, "rope_dim": 3}, "rope_dim is 3, must divide"),
        ({"kv_rank": 8, "rope_dim": 1}, "rope_dim is 1, must be an even number"),
        ({"kv_rank": 8, "nope_dim": 9}, "nope_dim is 9"),
        ({"kv_rank": 0}, "kv_rank is 0"),
        ({"kv_energy": 1.5}, "energy is 1.5"),
        ({"kv_rank": 8, "rotary": "slowest"}, "rotary is 'slowest'"),
        ({"kv_rank": 8, "layers": [2]}, "layers names 2"),
    ):
        with pytest.raises(ValueError, match=told):
            to_mla(model, copy=False, **named)
    assert len(find_sites(model)) == 2
    with pytest.raises(ValueError, match="which normalises keys"):
        to_mla(tiny("Qwen3"), kv_rank=8)
    with pytest.raises(ValueError, match="rope_dim is 4, must be 0"):
        to_mla(tiny("Bert"), kv_rank=8, rope_dim=4)
