"""Recovery: the losses are the published ones, and training brings a converted model back."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from heedful.convert import (
    distillation_loss,
    prefer,
    preference_loss,
    prune_heads,
    recover,
    to_gqa,
    to_mla,
    to_moh,
)
from heedful.convert.distill import train
from tests.convert.tiny import outcome, texts, tiny


def test_distillation_loss_by_hand():
    """KL(teacher || student), summed over tokens and words, over texts the mean."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    total = 0.0
    for b in range(2):
        for n in range(3):
            p, q = (
                teacher[b, n].exp() / teacher[b, n].exp().sum(),
                student[b, n].exp() / student[b, n].exp().sum(),
            )
            total += sum(p[v].item() * math.log(p[v].item() / q[v].item()) for v in range(5))
    assert distillation_loss(student, teacher).item() == pytest.approx(total / 2, rel=1e-5)
    assert distillation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_preference_loss_by_hand():
    loss = preference_loss(*(torch.tensor([x]) for x in (-3.0, -5.0, -4.0, -4.5)), beta=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1 * (1.0 + 0.5))))


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_distillation_recovers(kind):
    teacher = tiny(kind)
    batches = [texts(4, 9)]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    for student in (
        to_gqa(teacher, kv_heads=2)[0],
        to_mla(teacher, kv_rank=16)[0],
        prune_heads(teacher, {0: [1, 2, 3]})[0],
    ):
        start = (outcome(student, **batches[0]) - outcome(teacher, **batches[0])).norm()
        history = recover(student, teacher, batches, steps=40, lr=3e-3, progress=False)
        end = (outcome(student, **batches[0]) - outcome(teacher, **batches[0])).norm()
        assert len(history) == 40 and history[-1]["loss"] < 0.5 * history[0]["loss"]
        assert end < 0.8 * start
        assert not student.training and not teacher.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_converted_parameters_alone():
    teacher = tiny("Llama")
    student, _ = to_mla(teacher, kv_rank=16)
    recover(student, teacher, [texts()], steps=2, lr=1e-2, trainable="converted", progress=False)
    old = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        assert p.requires_grad
        if name in old and "self_attn" not in name:
            assert torch.equal(p, old[name]), name
    assert not torch.equal(
        student.model.layers[0].self_attn.o_proj.weight, teacher.model.layers[0].self_attn.o_proj.weight
    )


def test_auxiliary_losses_and_cross_entropy_are_in():
    teacher = tiny("Llama")
    student, _ = to_moh(teacher, shared_heads=2, routed_heads=4, balance=1.0)
    batch = texts()
    (with_aux,) = recover(student, teacher, [batch], steps=1, lr=0.0, progress=False)
    # All heads are on: no distance, and the loss at even use, 4 of 4 heads, the mean over two layers.
    assert with_aux["loss"] == pytest.approx(4, rel=1e-4)
    (with_ce,) = recover(student, teacher, [batch], steps=1, lr=0.0, ce_weight=1.0, progress=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        ce = teacher(**batch, labels=labels).loss
    assert with_ce["loss"] - with_aux["loss"] == pytest.approx(ce.item(), rel=1e-3)


def test_continued_training_of_a_mixture_of_heads():
    """As published: next tokens and 0.01 times the mean over layers of the loss of uneven use, no teacher."""
    student, _ = to_moh(tiny("Llama"), shared_heads=2, routed_heads=1)
    batch, old = texts(4, 9), copy.deepcopy(student)
    given = {}
    for layer in old.model.layers:
        layer.register_forward_pre_hook(lambda module, args: given.update({module: args[0]}))
    logits = old(**batch).logits
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for layer in old.model.layers:
        # R sum f P over the routed heads, of lengths in units of their spread
        length = (
            layer.self_attn.q_proj(layer.input_layernorm(given[layer]))
            .view(4, 9, 6, 8)[:, :, 2:]
            .norm(dim=-1)
        )
        p = (length / length.std(-1, keepdim=True)).softmax(-1).flatten(0, 1)
        f = torch.nn.functional.one_hot(p.argmax(-1), 4).float().mean(0)
        expected = expected + 0.01 * 4 * (f * p.mean(0)).sum() / 2
    history = recover(student, None, [batch], steps=30, lr=3e-3, kl_weight=0, ce_weight=1, progress=False)
    assert history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_preferences_are_learnt():
    reference = tiny("Llama")
    student, _ = to_gqa(reference, kv_heads=6)
    chosen, rejected = texts(2, 9), texts(2, 9)
    rejected["input_ids"] = rejected["input_ids"].flip(1)
    for batch in (chosen, rejected):
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :5] = -100
    history = prefer(student, reference, [(chosen, rejected)], steps=20, lr=1e-3, beta=0.1, progress=False)
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-3)
    assert history[-1]["loss"] < 0.5


def test_schedule():
    p = torch.nn.Parameter(torch.tensor([0.0]))
    seen = []

    def loss(step):
        seen.append(p.item())
        return p.sum()

    train([{"params": [p], "lr": 0.1}], loss, steps=10, warmup=0.2, progress=False)
    moves = [a - b for a, b in itertools.pairwise(seen)]  # Adam with one gradient moves by lr
    wanted = [0.05, 0.1, *(0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(7))]
    assert moves == pytest.approx(wanted, rel=1e-3)


@pytest.mark.door
def test_errors():
    model = tiny("Llama")
    for named, told in (
        ({"batches": []}, "batches is empty"),
        ({"lr": -1e-3}, "lr is -0.001, must be at least 0"),
        ({"steps": 0}, "steps is 0"),
        ({"trainable": "none"}, "trainable is 'none'"),
        ({"trainable": "converted"}, "student has no parameter"),
    ):
        with pytest.raises(ValueError, match=told):
            recover(model, model, **{"batches": [texts()], **named})
    with pytest.raises(
        ValueError, match="teacher is None, must be a model where kl_weight is not 0; it is 1"
    ):
        recover(model, None, [texts()])
    with pytest.raises(ValueError, match="pairs is empty"):
        prefer(model, model, [])
    bert = tiny("Bert")
    with pytest.raises(ValueError, match="ce_weight is 1, must be 0"):
        recover(bert, bert, [texts()], ce_weight=1, progress=False)
