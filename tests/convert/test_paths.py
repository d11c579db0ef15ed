"""Paths cut off from the classifier: nothing cut changes nothing, the rest is a sum, and it comes back."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from heedful.convert import load, prune_paths, recover, scale_paths
from heedful.inspect.path_ensemble import path_components, residual_paths
from tests.convert.tiny import check_decodes, outcome, texts, tiny


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
        initializer_range=0.3,
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_nothing_cut_changes_no_bit(kind):
    model = tiny(kind)
    new, report = prune_paths(model, ())
    assert torch.equal(outcome(new), outcome(model))
    assert report.what == "no path cut" and report.changes[0].after.what == "5 paths of 5"


@torch.no_grad()
def test_the_head_sees_the_sum_of_the_others(tmp_path):
    model = tiny("Llama")
    new, report = prune_paths(model, (0, 1, 3))
    terms = path_components(residual_paths(model), lambda: model(**texts()))
    wanted = model.lm_head(model.model.norm(terms[2] + terms[4]))[texts()["attention_mask"].bool()]
    torch.testing.assert_close(outcome(new), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outcome(model), wanted, atol=0.1)
    (change,) = report.changes
    assert (change.module, change.before.what, change.after.what) == (
        "model.norm",
        "5 paths of 5",
        "2 paths of 5",
    )
    assert report.parameters == (sum(p.numel() for p in model.parameters()),) * 2
    check_decodes(new, tmp_path)
    # A copy is cut by itself: the one that it was made from may run between.
    again = copy.deepcopy(new)
    torch.testing.assert_close(outcome(again), outcome(new), rtol=0, atol=0)
    assert not hasattr(model.config, "heedful_paths")
    assert list(new.model.norm.state_dict()) == ["weight", "path_weights.kept"]


def test_a_vision_transformer():
    model, x = vit(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        new, _ = prune_paths(model, (0, 2))
        terms = path_components(residual_paths(model), lambda: model(x))
        wanted = model.classifier(model.vit.layernorm(terms[1] + terms[3] + terms[4])[:, 0])
        torch.testing.assert_close(new(x).logits, wanted, rtol=1e-4, atol=1e-5)
    # With activation checkpointing the same gradients.
    new.train()
    grads = []
    for step in range(2):
        if step:
            new.gradient_checkpointing_enable()
        new.zero_grad()
        new(x).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in new.parameters() if p.grad is not None])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.vision_transformer.VisionTransformer(**options).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        new, report = prune_paths(model, (0,))
        assert report.changes[0].module == "norm"
        terms = path_components(residual_paths(model), lambda: model(x))
        torch.testing.assert_close(new(x), model.forward_head(model.norm(sum(terms[1:]))))


def test_it_learns_what_it_was():
    teacher = tiny("Llama")
    student, _ = prune_paths(teacher, (0, 1))
    history = recover(student, teacher, [texts(4, 9)], steps=30, lr=3e-3, progress=False)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_weights_start_at_the_model_and_are_part_of_it(kind, tmp_path):
    model = tiny(kind)
    new, report = scale_paths(model)
    assert torch.equal(outcome(new), outcome(model))
    assert report.parameters[1] - report.parameters[0] == 5 * 48 == new.model.norm.path_weights.weight.numel()
    assert report.what == "paths weighed"
    halved, _ = scale_paths(model, cut=(0,), init=0.5)
    with torch.no_grad():
        terms = path_components(residual_paths(model), lambda: model(**texts()))
        for row, weight in enumerate(halved.model.norm.path_weights.weight, start=1):
            weight += row * torch.arange(48) / 48
            terms[row] = terms[row] * (0.5 + row * torch.arange(48) / 48)
        wanted = model.lm_head(model.model.norm(sum(terms[1:])))[texts()["attention_mask"].bool()]
    torch.testing.assert_close(outcome(halved), wanted, rtol=1e-4, atol=1e-4)
    check_decodes(halved, tmp_path)


def test_a_vision_transformer_with_weights_learns_them_and_comes_back(tmp_path):
    model, x = vit(), torch.randn(2, 3, 8, 8)
    new, _ = scale_paths(model, cut=(0,))
    terms = path_components(residual_paths(model), lambda: model(x))
    total = sum(terms[1:]).detach().requires_grad_()
    model.classifier(model.vit.layernorm(total)[:, 0]).square().sum().backward()
    new(x).logits.square().sum().backward()
    # The gradient of a path's weight is its product with that of the sum.
    wanted = torch.stack([(total.grad * term).sum((0, 1)) for term in terms[1:]])
    weights = new.vit.layernorm.path_weights.weight
    torch.testing.assert_close(weights.grad, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        weights.normal_()
    new.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(x).logits, new(x).logits, rtol=0, atol=0)


def test_in_half_precision_nothing_is_widened():
    for new in (prune_paths(tiny("Llama"), (0,))[0], scale_paths(tiny("Llama"), init=0.5)[0]):
        new.to(torch.bfloat16)
        seen = []
        new.model.norm.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0].dtype))
        new(**texts())
        assert seen == [torch.bfloat16]


def test_plain_transformers_says_that_it_leaves_them_out(tmp_path):
    for new in (prune_paths(tiny("Llama"), (0,))[0], scale_paths(tiny("Llama"))[0]):
        new.save_pretrained(tmp_path)
        _, told = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        (left_out,) = told["unexpected_keys"]
        assert left_out.startswith("model.norm.path_weights.")


@pytest.mark.door
def test_errors():
    model = tiny("Llama")
    for cut in ((4,), (-1,), (7,)):
        with pytest.raises(ValueError, match="must name some of the paths 0 to 3"):
            prune_paths(model, cut)
    with pytest.raises(ValueError, match="model is of type 'bert', must be llama"):
        prune_paths(tiny("Bert"), (0,))
    new, _ = prune_paths(model, (0,))
    for changed in (lambda: prune_paths(new, (1,)), lambda: scale_paths(new)):
        with pytest.raises(ValueError, match="paths cut or weighed before"):
            changed()
    with pytest.raises(ValueError, match="must name some of the paths 0 to 3"):
        scale_paths(model, cut=(4,))
    other = vit()
    other.config.hidden_dropout_prob = 0.1
    with pytest.raises(ValueError, match=r"hidden_dropout_prob 0\.1, must be 0"):
        prune_paths(other, (0,))
