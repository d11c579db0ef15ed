"""Layers left out: what is kept computes what it did, and the importance says what is lost."""

from __future__ import annotations

import pytest
import torch

from heedful.convert import layer_importance, prune_heads, prune_layers, to_shrp
from heedful.convert.importance import mean_pooled
from tests.convert.tiny import check_loads, outcome, texts, tiny


def skipping(model, gone):
    """The same model, in which some layers give back what they are given."""
    for number in gone:
        model.encoder.layer[number].register_forward_hook(lambda module, given, out: given[0])
    return model


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_equals_the_model_that_skips_layers(kind, tmp_path):
    model = tiny(kind, num_hidden_layers=4)
    kept, report = prune_layers(model, [3, 1])
    expected = outcome(skipping(tiny(kind, num_hidden_layers=4), [0, 2]))
    torch.testing.assert_close(outcome(kept), expected)
    assert not torch.allclose(outcome(model), expected, atol=1e-2)
    assert [c.module for c in report.changes] == ["encoder.layer.0", "encoder.layer.2"]
    lost = sum(c.before.parameters for c in report.changes)
    assert report.parameters == (model.num_parameters(), model.num_parameters() - lost)
    assert report.parameters[1] == sum(p.numel() for p in kept.parameters())
    check_loads(kept, tmp_path)


def test_all_layers_change_nothing():
    model = tiny("Bert")
    same, report = prune_layers(model, range(2))
    assert torch.equal(outcome(same), outcome(model)) and not report.changes


@pytest.mark.parametrize("kind", ["experts", "heads"])
def test_layers_that_were_converted(kind, tmp_path):
    """Their numbers in the configuration follow them, so that they come back from a folder."""
    model = tiny("Bert", num_hidden_layers=3)
    made = (
        to_shrp(model)[0] if kind == "experts" else prune_heads(model, {0: [1], 1: [2, 3], 2: [0, 4, 5]})[0]
    )
    kept, report = prune_layers(made, [2])
    assert [c.before.what for c in report.changes] == (
        ["6 experts"] * 2 if kind == "experts" else ["1 heads and net", "2 heads and net"]
    )
    made.encoder.layer = made.encoder.layer[2:]
    assert torch.equal(outcome(kept), outcome(made))
    check_loads(kept, tmp_path)


def test_importance_is_the_loss_of_cosine():
    model = tiny("Bert", num_hidden_layers=3)
    batches = [texts(), texts(3, 5)]
    lost = []
    without = prune_layers(model, [0, 2])[0]
    with torch.no_grad():
        for batch in batches:
            one, other = (
                mean_pooled(m(**batch).last_hidden_state, batch["attention_mask"]) for m in (model, without)
            )
            lost += (1 - (one * other).sum(-1)).tolist()
    found = layer_importance(model, batches)
    assert found.shape == (3,)
    assert found[1].item() == pytest.approx(sum(lost) / len(lost), abs=1e-6)


@pytest.mark.door
def test_errors():
    model = tiny("Bert")
    for keep in ([], [2], [-1]):
        with pytest.raises(ValueError, match="must name some of the layers 0 to 1"):
            prune_layers(model, keep)
    with pytest.raises(ValueError, match="model is of type 'llama'"):
        prune_layers(tiny("Llama"), [0])
    with pytest.raises(ValueError, match="batches is empty"):
        layer_importance(model, [])
    model.config.is_decoder = True
    with pytest.raises(ValueError, match="model is a decoder"):
        layer_importance(model, [texts()])
