"""Interventions on text models of several families, on caches that slide or have places to come, on beams."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from heedful.hf import Handler, tap
from heedful.steer import (
    AttentionCalibration,
    GazeShiftGuidance,
    ImageFreeContrast,
    ImageTokenBoost,
    LocalCoherenceBoost,
    VisionHeadReinforcement,
    VisualAttentionReallocation,
    VisualAttentionRedistribution,
    answer_attention,
)
from heedful.steer.paint import boost
from tests.steer.contract import check_intervention
from tests.steer.models import TEXT, sharpened, words

SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "layer_types": SLIDING},
    "qwen3": {"head_dim": 8},
    "gpt_neox": {},
}
IMAGE = torch.zeros(2, 10, dtype=torch.bool)
IMAGE[:, 4:8] = True  # tokens taken for those of an image, as they are told


def redistribution(keep):
    return VisualAttentionRedistribution(
        keep=keep,
        threshold=1.2,
        min_nonsink_ratio=0.1,
        min_image_share=0.01,
        first_layer=1,
        skip_last_layer=False,
        image=IMAGE,
    )


def gaze(alpha):
    content = torch.arange(10).expand(2, 10) >= 8
    return GazeShiftGuidance(content, alpha, [1], [1, 2], image=IMAGE)


def reallocation(factor):
    steer = VisualAttentionReallocation(4, images=1)
    with torch.no_grad():
        steer.factors.fill_(factor)
    return steer


# name: (the intervention of a strength, a strength that acts, the one that does not)
STEER = {
    "visual-attention-redistribution": (redistribution, 0.3, 1.0),
    "vision-head-reinforcement": (
        lambda a: VisionHeadReinforcement(a, layers=[1, 3], image=IMAGE),
        2.0,
        1.0,
    ),
    "gaze-shift-guidance": (gaze, 3.0, 0.0),
    "image-token-boost": (lambda a: ImageTokenBoost(a, image=IMAGE), 0.9, 0.0),
    "image-free-contrast": (lambda a: ImageFreeContrast(a, 0.0, image=IMAGE), 1.5, 0.0),
    "visual-attention-reallocation": (reallocation, 1.7, 1.0),
    "local-coherence-boost": (lambda b: LocalCoherenceBoost(b, 3, layers=[1, 2], prompt=4), 2.0, 0.0),
    "attention-calibration": (lambda b: AttentionCalibration(beta=b, threshold=0.12), 0.2, 1.0),
}


def made(family):
    """A model in which token 9 is said to be of an image."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in TEXT.items() if family != "gpt_neox" or k != "num_key_value_heads"}
    config = hf.AutoConfig.for_model(family, **sizes, **FAMILIES[family], image_token_id=9)
    return sharpened(hf.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STEER)
def test_contract(family, name):
    model, (make, acting, idle) = made(family), STEER[name]
    check_intervention(lambda: make(acting), lambda: make(idle), model, words())


@pytest.mark.parametrize("name", STEER)
def test_what_is_told_of_a_row_goes_for_its_beams(name):
    """Beam search of a prompt that is there twice finds the same twice, with a cache and without."""
    model = made("qwen3")
    make, acting, _ = STEER[name]
    inputs = {key: value[:1].expand(2, -1) for key, value in words().items()}
    how = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False}
    with torch.no_grad(), make(acting)(model):
        found = model.generate(**inputs, **how)
    assert torch.equal(found[0], found[1])
    assert found.shape == (2, 13)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", ["image-free-contrast", "local-coherence-boost", "visual-attention-reallocation"]
)
def test_a_cache_changes_nothing(family, name):
    """Also one that slides: keys that have left it do not move the others."""
    model, (make, acting, _) = made(family), STEER[name]
    how = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        with make(acting)(model):
            found = model.generate(**words(), **how)
            without = model.generate(**words(), **how, use_cache=False)
        plain = model.generate(**words(), **how)
    torch.testing.assert_close(found.logits, without.logits, rtol=1e-3, atol=1e-3)  # float32
    assert not torch.allclose(found.logits[1], plain.logits[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answers_attention_is_zero_where_the_window_has_passed(family):
    model, inputs = made(family), {"input_ids": words(1)["input_ids"]}
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found = answer_attention(model, inputs, max_new_tokens=4)
    model.set_attn_implementation("eager")
    image = inputs["input_ids"][0] == 9
    assert image.any()
    for step in range(4):
        out = model(written[:, : 10 + step], output_attentions=True)
        wanted = torch.stack([a[0, :, -1, :10].mean(0)[image] for a in out.attentions])
        torch.testing.assert_close(found[step], wanted, rtol=1e-3, atol=1e-5)  # float32


class Look(Handler):
    """The logits of each call."""

    def __init__(self):
        self.found = []

    def logits(self, site, logits):
        self.found.append(logits)
        return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_right_in_a_cache_that_slides(family):
    model, before, after, sizes = made(family), Look(), Look(), set()
    with torch.no_grad(), tap(model, before), ImageTokenBoost(0.9, [0, 1], IMAGE)(model), tap(model, after):
        model.generate(**words(), max_new_tokens=6, do_sample=False)
    for call, (one, two) in enumerate(zip(before.found, after.found, strict=True)):
        read = 10 + call // 4
        known = torch.nn.functional.pad(0.9 * IMAGE, (0, read - 10))[:, read - one.shape[-1] :]
        torch.testing.assert_close(two, boost(one, known) if call % 4 < 2 else one)
        sizes.add(one.shape[-1])
    assert (4 in sizes) == ("sliding_window" in FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STEER)
def test_a_static_cache_is_as_good(family, name):
    model, (make, acting, _) = made(family), STEER[name]
    how = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), make(acting)(model):
        found = model.generate(**words(), **how)
        static = model.generate(**words(), **how, cache_implementation="static")
    torch.testing.assert_close(static.logits, found.logits, rtol=1e-3, atol=1e-3)  # float32
