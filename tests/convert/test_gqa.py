"""Grouped-query attention out of multi-head attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from heedful.convert import to_gqa
from heedful.convert.gqa import group_heads, head_similarity
from heedful.convert.sites import find_sites
from tests.convert.tiny import cache_bytes, check_decodes, check_loads, outcome, tiny

CAUSAL = ("Llama", "Mistral", "Qwen2", "Qwen3")
ENCODERS = ("Bert", "Roberta", "Electra")


def duplicated(model, groups):
    """Heads of a group get the keys and values of its first."""
    with torch.no_grad():
        for site in find_sites(model):
            for linear in (site.key, site.value):
                for p in linear.parameters():
                    heads = p.unflatten(0, (-1, site.head_dim))
                    for group in groups:
                        heads[group] = heads[group[0]].clone()
    return model


@pytest.mark.parametrize("kind", CAUSAL + ENCODERS)
def test_planted_duplicates_are_found_and_nothing_changes(kind, tmp_path):
    groups = [[0, 4], [1, 3], [2, 5]]
    model = duplicated(tiny(kind), groups)
    for site in find_sites(model):
        assert group_heads(head_similarity(site), 2) == groups
    before = copy.deepcopy(model.state_dict())
    small, report = to_gqa(model, kv_heads=3, grouping="similarity")
    torch.testing.assert_close(outcome(small), outcome(model), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    # Neighbours are other groups, and their means other functions.
    assert not torch.allclose(outcome(to_gqa(model, kv_heads=3)[0]), outcome(model), atol=1e-2)
    if kind in CAUSAL:
        assert report.cache_bytes == (cache_bytes(model), cache_bytes(small))
        assert report.cache_bytes[1] * 2 == report.cache_bytes[0]
        check_decodes(small, tmp_path)
    else:
        assert report.cache_bytes == (0, 0)
        check_loads(small, tmp_path)
    assert report.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (model, small))
    removed = sum(c.before.parameters - c.after.parameters for c in report.changes)
    assert removed == report.parameters[0] - report.parameters[1] > 0


def test_means_of_neighbours():
    model = tiny("Qwen2")
    small, _ = to_gqa(model, kv_heads=2)
    old, new = find_sites(model)[1], find_sites(small)[1]
    heads = old.key.weight.unflatten(0, (6, 8))
    torch.testing.assert_close(new.key.weight, torch.cat([heads[:3].mean(0), heads[3:].mean(0)]))
    torch.testing.assert_close(new.value.bias[8:], old.value.bias.unflatten(0, (6, 8))[3:].mean(0))
    assert torch.equal(new.query.weight, old.query.weight)


def test_groups_that_are_grouped_already():
    """Key and value heads that serve several query heads are merged with these."""
    model = duplicated(tiny("Qwen3", num_key_value_heads=3, head_dim=16), [[0, 2]])
    same, _ = to_gqa(model, kv_heads=3, grouping="similarity")
    torch.testing.assert_close(outcome(same), outcome(model), rtol=1e-4, atol=1e-4)
    one, _ = to_gqa(duplicated(model, [[0, 1, 2]]), kv_heads=1, grouping="similarity")
    torch.testing.assert_close(outcome(one), outcome(model), rtol=1e-4, atol=1e-4)


def test_plain_transformers_loads_it(tmp_path):
    small, _ = to_gqa(tiny("Llama"), kv_heads=2)
    small.save_pretrained(tmp_path)
    assert torch.equal(outcome(AutoModelForCausalLM.from_pretrained(tmp_path)), outcome(small))


def test_in_place():
    model = tiny("Bert")
    same, _ = to_gqa(model, kv_heads=2, copy=False)
    assert same is model
    assert model.encoder.layer[0].attention.self.k_proj.out_features == 16


def test_groups_are_the_best_ones():
    """Against all ways to group six heads in pairs; the greedy start alone is not always that good."""
    pairings = [
        [[0, a], sorted((b, c)), sorted({1, 2, 3, 4, 5} - {a, b, c})]
        for a in range(1, 6)
        for b in [min({1, 2, 3, 4, 5} - {a})]
        for c in {1, 2, 3, 4, 5} - {a, b}
    ]
    assert len(pairings) == 15
    found = 0
    for seed in range(20):
        s = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        s = s + s.T
        inside = lambda groups: sum(s[a, b].item() for a, b in groups)  # noqa: E731, B023
        found += inside(group_heads(s, 2)) > max(map(inside, pairings)) - 1e-9
    assert found >= 18


def test_report():
    _, report = to_gqa(tiny("Llama"), kv_heads=2)
    told = report.as_dict()
    # Queries and output 48 x 48 each, keys and values 48 x 16 each; 6 heads of 8 channels see 1024 tokens.
    assert told["changes"][0]["after"]["multiply_adds"] == 2 * 48 * 48 + 2 * 48 * 16 + 2 * 1024 * 48
    assert told["changes"][0]["after"]["cache_bytes"] == 2 * 16 * 4
    text = str(report)
    assert "model.layers.1.self_attn" in text and "6 heads, 2 KV" in text and "whole model" in text


@pytest.mark.door
def test_errors_leave_the_model_alone():
    model = tiny("Llama")
    before = outcome(model)
    for named, told in (
        ({"kv_heads": 4}, "kv_heads is 4, must divide"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"kv_heads": 2, "grouping": "nearest"}, "grouping is 'nearest'"),
        ({"kv_heads": 2, "context": 0}, "context is 0"),
    ):
        with pytest.raises(ValueError, match=told):
            to_gqa(model, copy=False, **named)
    assert torch.equal(outcome(model), before)
    with pytest.raises(ValueError, match="model is of type 'gpt2', must be one of llama"):
        to_gqa(_gpt2(), kv_heads=2)
    with pytest.raises(ValueError, match="model is a Linear, must be a transformers PreTrainedModel"):
        to_gqa(torch.nn.Linear(2, 2), kv_heads=2)
    bert, _ = to_gqa(tiny("Bert"), kv_heads=2)
    with pytest.raises(ValueError, match="all is converted"):
        to_gqa(bert, kv_heads=2)


def _gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=5))
