"""What the report explains, and how it looks."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
import transformers as hf

from heedful.inspect import Attribution, Sample, Subject, image_sample, inspect_model, report
from heedful.inspect import explanations as told
from heedful.inspect.explanation_section import body, plain
from heedful.inspect.explanations import explain
from heedful.inspect.objective import objective
from tests.test_tap import made

SIX = [
    "gradient",
    "gradient × input",
    "integrated gradients",
    "attention × gradient",
    "attention rollout",
    "occlusion",
]


def text(family, tokens=8):
    model, inputs = made(family)
    inputs = {"input_ids": inputs["input_ids"][:1, :tokens], "attention_mask": torch.ones(1, tokens).long()}
    special = torch.arange(tokens) == 0
    return model, Sample("title", inputs, [f"t{i}" for i in range(tokens)], special, inputs["input_ids"][0])


def test_the_number_of_a_language_model():
    model, sample = text("llama")
    target = objective(Subject(model, "m", [sample]), sample)
    with torch.no_grad():
        logits = model(**sample.inputs).logits[0, -1]
    assert target.with_all() == pytest.approx(logits.log_softmax(-1).max().item(), rel=1e-5)
    assert target.name.endswith(f"next token, number {int(logits.argmax())}")
    assert target.tokens == sample.labels and target.free.tolist() == [False] + [True] * 7


def test_the_number_of_an_encoder():
    model, sample = text("bert")
    target = objective(Subject(model, "m", [sample]), sample)
    assert target.with_all() == pytest.approx(1, abs=1e-5)
    assert target.with_none() == pytest.approx(0, abs=1e-5)
    # Half of the tokens: the embedding's place along the way, by hand.
    kept = torch.arange(8) < 4
    words = model.get_input_embeddings()(sample.inputs["input_ids"])[0]
    empty = model.get_input_embeddings()(torch.tensor([model.config.pad_token_id or 0]))
    with torch.no_grad():
        here, whole, nothing = (
            model(inputs_embeds=torch.where((k | sample.special)[:, None], words, empty)[None])[0].mean(1)[0]
            for k in (kept, torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool))
        )
    wanted = ((here - nothing) @ (whole - nothing) / (whole - nothing).square().sum()).item()
    assert target.with_parts(kept[None]).item() == pytest.approx(wanted, abs=1e-5)


def test_the_number_of_classes():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = hf.ViTConfig(**sizes, image_size=24, patch_size=8, id2label={0: "cat", 1: "dog"})
    model = hf.ViTForImageClassification(config).eval()
    sample = image_sample(torch.randn(1, 3, 24, 24), patch=8, model=model)
    target = objective(Subject(model, "m", [sample]), sample)
    logits = model(**sample.inputs).logits[0]
    assert target.name == f"the logit of class “{['cat', 'dog'][logits.argmax()]}”"
    assert target.with_all() == pytest.approx(logits.max().item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_explanations_of_texts(family):
    model, sample = text(family)
    found = inspect_model(Subject(model, "m", [sample])).explanations
    assert found.methods == SIX and not found.missing
    each = found.samples[0]
    assert found.agreement().table.shape == (6, 6)
    areas = found.areas()
    assert [row[0] for row in areas] == [*SIX, "by chance"]
    for curves, first in ((each.deletion, 1.0), (each.insertion, 0.0)):
        for curve in curves:
            assert curve.values[0].item() == pytest.approx(first, abs=1e-4)
            assert curve.values[-1].item() == pytest.approx(1 - first, abs=1e-4)
    assert areas[5][1] < areas[6][1]  # leaving out one by one tells more than chance
    (scores,) = (a.scores for a in each.attributions if a.method == "occlusion")
    token = each.target.tokens[int(scores.argmax())]
    assert f"rests most on “{token}”" in plain(found)
    page = str(body(found))
    assert page.count("<title>") >= 6 * 8 + 36 and "(always there)" in page
    assert "<p>In words, by integrated gradients: " in page
    stored = json.loads(json.dumps(found.as_dict()))
    assert stored["samples"][0]["scores"]["occlusion"] == pytest.approx(scores.tolist())


def test_patches_are_joined_where_there_are_many(monkeypatch, tmp_path):
    monkeypatch.setattr(told, "PATCHES", 4)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=12, num_heads=3).eval()
    samples = [image_sample(torch.randn(1, 3, 64, 64), patch=16, model=model) for _ in range(2)]
    found = report(model, samples, tmp_path / "page.html").explanations
    assert len(found.samples) == 1 and found.methods == SIX  # images take long
    assert {a.scores.shape for a in found.samples[0].attributions} == {(4,)}
    page = (tmp_path / "page.html").read_text("utf-8")
    (reasons,) = re.findall(r'<section id="reasons">.*?</section>', page, re.S)
    assert reasons.count("<figcaption>") == 6 and reasons.count("<rect") == 6 * 4 + 36
    assert "the patch in row" in page and not re.search(r"(src|href)=\"(?!data:|#)", page)
    fine = Attribution("x", [str(i) for i in range(16)], torch.arange(16.0), (4, 4))
    assert told._joined(fine, found.samples[0].target, 2).scores.tolist() == [10, 18, 42, 50]
    with pytest.raises(ValueError, match="3 × 7 patches cannot be joined"):
        told._step((3, 7))


def test_what_cannot_be_explained_is_said():
    model, sample = text("bert")
    long = Sample("long", sample.inputs, ["x"] * 129, torch.zeros(129, dtype=torch.bool))
    bare = Sample("bare", sample.inputs, sample.labels, torch.ones(8, dtype=torch.bool))
    found = explain(Subject(model, "m", [long, bare, sample]), [])
    assert [each.sample for each in found.samples] == [sample]
    assert "attention rollout" not in found.methods
    assert found.missing == [
        "“long” has 129 tokens; at most 128 are explained.",
        "“bare” has no token but special ones.",
    ]
    nothing = explain(Subject(model, "m", [long]), [])
    assert not nothing.samples and "at most 128" in str(body(nothing))
    assert nothing.as_dict() == {"missing": nothing.missing}
