"""Outlier token contrast: its formulas by loops, and generation beside two streams by hand."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.hf import Handler, tap
from heedful.steer import ImageTokenBoost, OutlierTokenContrast
from heedful.steer.damro import class_attention, outlier_places
from tests.steer.contract import check_intervention
from tests.steer.models import IMAGE, llama, llava, picture_prompt


def test_class_attention_equals_transcription():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    full_q, full_k = (x.transpose(1, 2).flatten(2) for x in (q, k))  # as the projections give them
    wanted = (full_q @ full_k.mT * 12**-0.5).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(class_attention(q, k), wanted)
    by_head = torch.stack([(q[:, h] @ k[:, h].mT / 2).softmax(-1) for h in range(3)])
    torch.testing.assert_close(class_attention(q, k, split=True), by_head.mean(0)[:, 0, 1:])


def test_places_equal_transcription():
    image = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0]]).bool()
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, :2] = False
    attention = torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.1, 0.4], [0.1, 0.2, 0.7]])
    place, real = outlier_places(attention, image, keep, 2)
    assert place[0].tolist() == [0, 2, 3, 4, 7, 5, 8]
    assert real[0].all()
    assert place[1, real[1]].tolist() == [2, 5, 4, 6, 7, 8]
    assert real[1].tolist() == [False] + [True] * 6


def settings(alpha: float = 1.5, beta: float = 0.0, **how) -> OutlierTokenContrast:
    return OutlierTokenContrast(alpha, how.pop("k", 3), beta, **how)


def test_contract():
    check_intervention(settings, lambda: settings(0.0), llava(), picture_prompt())


class Tower(Handler):
    """The class token's attention in the layer before the last, from the model's own weights."""

    def see(self, site):
        if "vision" in site.name and site.layer == 1:
            self.attention = class_attention(site.query, site.key)[0]
            self.heads = site.weights()[0, :, 0, 1:].mean(0)


@pytest.mark.parametrize("heads", ["merged", "mean"])
def test_generation_equals_two_streams_without_caches(heads):
    model, inputs = llava(), picture_prompt()
    with torch.no_grad(), settings(beta=0.1, heads=heads)(model):
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for b in range(2):
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool()][None]
        pixels = inputs["pixel_values"][b : b + 1]
        tower = Tower()
        with torch.no_grad(), tap(model, tower):
            features = torch.cat(model.model.get_image_features(pixels).pooler_output)
        best = (tower.attention if heads == "merged" else tower.heads).topk(3).indices  # descending
        for step in range(4):
            with torch.no_grad():
                main = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
                first = ids[0].tolist().index(IMAGE)
                embeds = model.get_input_embeddings()(ids[0])
                embeds = torch.cat([embeds[:first], features[best], embeds[first + 9 :]])
                other = model(inputs_embeds=embeds[None]).logits[0, -1]
            z = 2.5 * main - 1.5 * other
            z[main < math.log(0.1) + main.max()] = -math.inf
            assert found[b, 16 + step] == z.argmax()
            ids = torch.cat([ids, z.argmax()[None, None]], dim=1)


def test_beams_and_other_interventions():
    model, inputs = llava(), picture_prompt()
    how = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    with torch.no_grad(), settings()(model), ImageTokenBoost(0.5)(model):
        with_cache = model.generate(**inputs, **how)
        assert torch.equal(model.generate(**inputs, **how, use_cache=False), with_cache)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="must have a vision tower"), settings()(llama()):
        pass
    with pytest.raises(ValueError, match="heads is 'max', must be one of"):
        settings(heads="max")
    with settings(k=10)(model := llava()), pytest.raises(ValueError, match="k is 10, must be at most 9"):
        model(**picture_prompt())
