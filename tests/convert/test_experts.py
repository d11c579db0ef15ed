"""Layers of experts: what they compute, how they recover, and which heads go."""

from __future__ import annotations

import pytest
import torch

from heedful.convert import prune_experts, recover, to_shrp
from heedful.convert.sites import find_sites
from tests.convert.tiny import check_loads, outcome, texts, tiny


def test_start_is_one_head_through_the_output_projection(tmp_path):
    """By hand, token by token: the head that the router likes best, its gate, the sum of W_o's slices."""
    model = tiny("Bert", num_hidden_layers=1)
    new, report = to_shrp(model)
    layer, site = new.encoder.layer[0], find_sites(model)[0]
    x, batch = torch.randn(2, 9, 48), texts()
    with torch.no_grad():
        y = layer(x, batch["attention_mask"].bool()[:, None, None].expand(2, 1, 9, 9))
        query, key, value = (f(x).view(2, 9, 6, 8) for f in (site.query, site.key, site.value))
        out = site.out.weight.view(48, 6, 8).sum(1)
        for b in range(2):
            seen = batch["attention_mask"][b].bool()
            for i in range(9):
                gate = (layer.experts.router.weight @ x[b, i]).softmax(0)
                h = int(gate.argmax())
                weight = (key[b, seen, h] @ query[b, i, h] / 8**0.5).softmax(0)
                made = out @ (weight @ value[b, seen, h]) + 6 * site.out.bias
                expected = model.encoder.layer[0].output.LayerNorm(x[b, i] + gate[h] * made)
                torch.testing.assert_close(y[b, i], expected, rtol=1e-4, atol=1e-4)
    # 6 heads of 8 channels; the expander is 32 wide, the net was 40.
    own = 3 * (48 * 48 + 48) + (8 * 32 + 32) + (32 * 48 + 48) + 6 * 48 + 2 * 48
    assert report.changes[0].after.parameters == own
    assert report.changes[0].after.multiply_adds == 3 * 48 * 48 + 8 * 32 + 32 * 48 + 6 * 48 + 2 * 1024 * 8
    assert report.changes[0].before.parameters == sum(p.numel() for p in model.encoder.layer[0].parameters())
    check_loads(new, tmp_path)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "heedful"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_padding_has_no_influence(kind, implementation):
    import heedful.hf  # noqa: F401

    new, _ = to_shrp(tiny(kind))
    new.set_attn_implementation(implementation)
    batch = texts()
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 5)}
    if kind != "Roberta":  # whose positions are told from the padding tokens
        torch.testing.assert_close(outcome(new, **batch), outcome(new, **other))
    alone = {name: value[1:] for name, value in batch.items()}
    torch.testing.assert_close(outcome(new, **alone), outcome(new, **batch)[6:], rtol=1e-4, atol=1e-5)


def test_recovery_and_pruning_by_use(tmp_path):
    teacher = tiny("Bert")
    student, _ = to_shrp(teacher, balance=0.0)
    batches = [texts(4, 9)]
    history = recover(student, teacher, batches, steps=40, lr=3e-3, progress=False)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    small, report = prune_experts(student, batches, share=0.01)
    assert [c.after.what for c in report.changes] == ["1 head", "1 head"]
    assert all(layer.experts.router is None for layer in small.encoder.layer)
    assert report.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (student, small))
    check_loads(small, tmp_path)
    # The head that stays is the one that most tokens took in the first layer, padding left out.
    layer = student.encoder.layer[0]
    with torch.no_grad():
        x = student.embeddings(input_ids=batches[0]["input_ids"])
        _, taken = layer.experts.choose(x)
    used = taken[batches[0]["attention_mask"].bool()].sum(0)
    head = int(used.argmax())
    assert torch.equal(
        small.encoder.layer[0].experts.query.weight, layer.experts.query.weight.view(6, 8, 48)[head]
    )
    # All tokens are served by the heads that are used at all.
    served, _ = prune_experts(student, batches, share=1.0)
    assert served.encoder.layer[0].experts.heads == (used > 0).sum()


@pytest.mark.door
def test_errors():
    bert = tiny("Bert")
    for named, told in (
        ({"hidden": 15}, "hidden is 15, must be at least 16"),
        ({"route": "text"}, "route is 'text'"),
    ):
        with pytest.raises(ValueError, match=told):
            to_shrp(bert, copy=False, **named)
    with pytest.raises(ValueError, match="model is of type 'llama'"):
        to_shrp(tiny("Llama"))
    with pytest.raises(ValueError, match="model has no layer of experts"):
        prune_experts(bert, [texts()])
    new, _ = to_shrp(bert)
    with pytest.raises(ValueError, match="batches is empty"):
        prune_experts(new, [])
    with pytest.raises(ValueError, match="share is 0"):
        prune_experts(new, [texts()], share=0)
    with pytest.raises(ValueError, match="all is converted"):
        to_shrp(new)
