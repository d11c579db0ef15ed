"""Two streams of logits: formulas by loops, and generation beside two models run without caches."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.steer import ImageFreeContrast, ImageTokenBoost
from heedful.steer.contrastive import contrast, plausible
from tests.steer.contract import check_intervention
from tests.steer.models import IMAGE, llama, llava, picture_prompt, words


def test_contrast_equals_transcription():
    generator = torch.Generator().manual_seed(0)
    main, other = (2 * torch.randn(4, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    found = contrast(main, other, 0.7, 0.2)
    cut = 0
    for row in range(4):
        p = main[row].softmax(-1)
        for v in range(9):
            wanted = 1.7 * main[row, v] - 0.7 * other[row, v]
            if p[v] < 0.2 * p.max():
                wanted, cut = -math.inf, cut + 1
            assert found[row, v].item() == pytest.approx(float(wanted))
    assert 0 < cut < 36
    assert torch.equal(contrast(main, other, 0.0, 0.0), main)
    assert plausible(main, 1.0).sum(-1).eq(1).all()


def test_guided_classification_is_the_formula_of_the_paper():
    """gamma (s - u) + u of log-softmaxes is the same up to a constant, with alpha = gamma - 1."""
    generator = torch.Generator().manual_seed(0)
    main, other = (torch.randn(3, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    s, u = main.log_softmax(-1), other.log_softmax(-1)
    found = contrast(main, other, 0.6, 0.0)
    torch.testing.assert_close(found.log_softmax(-1), (1.6 * (s - u) + u).log_softmax(-1))


def settings(alpha: float = 1.5, beta: float = 0.0) -> ImageFreeContrast:
    return ImageFreeContrast(alpha, beta)


def test_contract():
    check_intervention(settings, lambda: settings(0.0), llava(), picture_prompt())


def test_generation_equals_two_streams_without_caches():
    model, inputs = llava(), picture_prompt()
    with torch.no_grad(), settings(beta=0.1)(model):
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for b in range(2):
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool()][None]
        pixels = inputs["pixel_values"][b : b + 1]
        for step in range(4):
            with torch.no_grad():
                main = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
                other = model(input_ids=ids[ids != IMAGE][None]).logits[0, -1]
            z = 2.5 * main - 1.5 * other
            z[main < math.log(0.1) + main.max()] = -math.inf
            assert found[b, 16 + step] == z.argmax()
            ids = torch.cat([ids, z.argmax()[None, None]], dim=1)


def test_only_the_last_logits_change():
    model, inputs = llava(), picture_prompt()
    with torch.no_grad():
        plain = model(**inputs).logits
        with settings()(model):
            found = model(**inputs).logits
    assert torch.equal(found[:, :-1], plain[:, :-1])
    assert not torch.equal(found[:, -1], plain[:, -1])


def test_beams_take_their_caches_along():
    model, inputs = llava(), picture_prompt()
    how = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with torch.no_grad(), settings()(model):
        with_cache = model.generate(**inputs, **how)
        assert torch.equal(model.generate(**inputs, **how, use_cache=False), with_cache)


def test_the_other_stream_is_not_steered():
    """A boost of image tokens that are not there would fail."""
    model, inputs = llava(), picture_prompt()
    with torch.no_grad(), ImageTokenBoost(0.5)(model):
        boosted = model(**inputs).logits[:, -1]
    with torch.no_grad():
        free = torch.stack(
            [
                model(input_ids=ids[(ids != IMAGE) & (ids != 0)][None]).logits[0, -1]
                for ids in inputs["input_ids"]
            ]
        )
        for stacked in ((settings(), ImageTokenBoost(0.5)), (ImageTokenBoost(0.5), settings())):
            with stacked[0](model), stacked[1](model):
                found = model(**inputs).logits[:, -1]
            torch.testing.assert_close(found, 2.5 * boosted - 1.5 * free, rtol=1e-4, atol=1e-4)  # float32


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"beta is 2, must lie in \[0, 1\]"), settings(beta=2)(llava()):
        pass
    with settings()(model := llama()), pytest.raises(ValueError, match="has none of image_token_id"):
        model(**words())
    with settings()(model := llava()), pytest.raises(ValueError, match=r"attention_mask is .*, must have"):
        model(**{**picture_prompt(), "attention_mask": torch.ones(2, 1, 16, 16)})
