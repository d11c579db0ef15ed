"""Heads left out: what is kept computes what it did, and the importance says what is lost."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import output_capturing

from heedful.convert import head_importance, heads_by_importance, load, prune_heads
from heedful.convert.importance import mean_pooled
from heedful.convert.sites import find_sites
from tests.convert.tiny import cache_bytes, check_decodes, check_loads, outcome, texts, tiny

KEEP = {0: [4, 1], 1: [0, 2, 3, 5]}


def silenced(model, keep):
    """The same model whose output projection ignores the other heads."""
    with torch.no_grad():
        for site in find_sites(model):
            gone = [h for h in range(site.heads) if h not in keep.get(site.layer, range(site.heads))]
            site.out.weight.unflatten(1, (-1, site.head_dim))[:, gone] = 0
    return model


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Bert", "Roberta"])
@pytest.mark.parametrize("kv", [6, 2])
def test_equals_the_model_whose_heads_are_silent(kind, kv, tmp_path):
    causal = kind not in ("Bert", "Roberta")
    changes = {"num_key_value_heads": kv} if causal else {}
    model = tiny(kind, **changes)
    pruned, report = prune_heads(model, KEEP)
    expected = outcome(silenced(tiny(kind, **changes), KEEP))
    torch.testing.assert_close(outcome(pruned), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outcome(model), expected, atol=1e-2)
    if causal:
        assert report.cache_bytes == (cache_bytes(model), cache_bytes(pruned))
        check_decodes(pruned, tmp_path)
    else:
        check_loads(pruned, tmp_path)


def test_all_heads_change_nothing():
    model = tiny("Bert")
    same, report = prune_heads(model, {0: range(6), 1: range(6)})
    torch.testing.assert_close(outcome(same), outcome(model), rtol=1e-5, atol=1e-5)
    assert report.parameters[0] == report.parameters[1]


def test_layers_not_named_stay():
    model = tiny("Llama")
    pruned, report = prune_heads(model, {1: [3]})
    assert [c.module for c in report.changes] == ["model.layers.1.self_attn"]
    assert type(pruned.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
    # A layer that is left may be pruned later, one that is done may not.
    again, _ = prune_heads(pruned, {0: [2]})
    torch.testing.assert_close(outcome(again), outcome(prune_heads(model, {0: [2], 1: [3]})[0]))


def test_importance_of_a_silent_head_is_zero():
    model = silenced(tiny("Bert"), {0: [0, 1, 2, 4, 5]})
    importance = head_importance(model, [texts()], progress=False)
    assert importance.shape == (2, 6)
    assert importance[0, 3].abs() < 1e-6
    rest = torch.ones(2, 6, dtype=torch.bool)
    rest[0, 3] = False
    assert (importance[rest] > 1e-5).all()


def test_importance_is_the_loss_of_cosine():
    model = tiny("Bert")
    batches = [texts(), texts(3, 5)]
    importance = head_importance(model, batches, progress=False)
    lost = []
    without = prune_heads(model, {1: [0, 1, 2, 3, 5]})[0]
    for batch in batches:
        with torch.no_grad():
            one, other = (
                mean_pooled(m(**batch).last_hidden_state, batch["attention_mask"]) for m in (model, without)
            )
        lost += (1 - (one * other).sum(-1)).tolist()
    assert importance[1, 4].item() == pytest.approx(sum(lost) / len(lost), abs=1e-6)


def test_importance_of_language_models():
    """The Jensen-Shannon divergence of the next token's probabilities, over real tokens."""
    model = tiny("Llama")
    importance = head_importance(model, [texts()], progress=False)
    p, q = (outcome(m).double().softmax(-1) for m in (model, prune_heads(model, {0: [0, 1, 2, 3, 4]})[0]))
    middle = (p + q) / 2
    divergence = (p * (p / middle).log() + q * (q / middle).log()).sum(-1) / 2
    assert importance[0, 5].item() == pytest.approx(divergence.mean().item(), rel=1e-3)


def test_heads_by_importance():
    importance = torch.tensor([[5.0, 4.0, 3.0, 2.0], [0.1, 0.4, 0.3, 0.2]])
    assert heads_by_importance(importance, 0.5) == {0: [0, 1, 2], 1: [1]}
    assert heads_by_importance(importance, 0.5, evenly=True) == {0: [0, 1], 1: [1, 2]}
    assert heads_by_importance(importance, 0.01) == {0: [0], 1: [1]}
    assert heads_by_importance(importance, 1.0) == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    assert heads_by_importance(importance, 0.51, evenly=True) == {0: [0, 1, 2], 1: [1, 2, 3]}


@pytest.mark.door
def test_errors(tmp_path):
    model = tiny("Bert")
    for keep, told in (
        ({}, "keep is empty"),
        ({0: []}, r"keep has \[\] in layer 0"),
        ({0: [6]}, "must name some of the heads 0 to 5"),
        ({0: [1, 1]}, "must name some of the heads"),
        ({7: [0]}, r"layers names 7, must name some of \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=told):
            prune_heads(model, keep, copy=False)
    assert len(find_sites(model)) == 2
    with pytest.raises(ValueError, match="share is 0"):
        heads_by_importance(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match="batches is empty"):
        head_importance(model, [])
    with pytest.raises(ValueError, match="model has converted attention"):
        head_importance(prune_heads(model, {0: [1]})[0], [texts()])
    with pytest.raises(ValueError, match="must be a folder with"):
        load(tmp_path)
    prune_heads(model, KEEP)[0].save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"heads"', '"feet"'))
    with pytest.raises(ValueError, match="unknown kind, 'feet'"):
        load(tmp_path)


def test_loaded_where_the_plain_class_was_never_built(tmp_path):
    model = tiny("Bert")
    prune_heads(model, KEEP)[0].save_pretrained(tmp_path)
    # transformers learns what a class records as one is built
    output_capturing._CAN_RECORD_REGISTRY.pop(str(type(model)))
    again = load(tmp_path)
    hidden = again(**texts(), output_hidden_states=True).hidden_states
    assert len(hidden) == 3 and torch.equal(hidden[-1], again(**texts()).last_hidden_state)
