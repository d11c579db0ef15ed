"""Boosted attention to image tokens: its formulas by loops, and its place in a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heedful.hf import Handler, tap
from heedful.steer import ImageTokenBoost, InformedTokenBoost
from heedful.steer.paint import boost, informed_tokens
from tests.steer.contract import check_intervention
from tests.steer.models import IMAGE, llama, llava, picture_prompt, words


def test_sets_equal_transcription():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(3, 36, dtype=torch.float64, generator=generator)
    last = torch.rand(3, 36, dtype=torch.float64, generator=generator) ** 6  # a long tail
    local, summary = informed_tokens(first, last, local_ratio=0.25)
    for b in range(3):
        q1, q3 = np.percentile(last[b].numpy(), [25, 75])
        outliers = {j for j in range(36) if last[b, j] > q3 + 1.5 * (q3 - q1)}
        best = sorted(range(36), key=lambda j: -float(first[b, j]))[:9]
        assert set(summary[b].nonzero()[:, 0].tolist()) == outliers
        assert set(local[b].nonzero()[:, 0].tolist()) == set(best) - outliers
        assert outliers
    assert not (local & summary).any()


def test_boost_equals_transcription():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=generator)
    logits[0, :, :, 0] = -torch.inf
    coefficient = torch.rand(2, 6, dtype=torch.float64, generator=generator)
    wanted = logits.clone()
    for b in range(2):
        for h in range(3):
            for j in range(6):
                if logits[b, h, 3, j] > -torch.inf:
                    wanted[b, h, 3, j] += coefficient[b, j] * abs(logits[b, h, 3, j])
    torch.testing.assert_close(boost(logits, coefficient), wanted)


@pytest.mark.parametrize(
    ("make", "idle"),
    [
        (lambda: InformedTokenBoost(alpha=0.9), lambda: InformedTokenBoost(alpha=0.0, beta=0.0)),
        (lambda: ImageTokenBoost(alpha=0.9), lambda: ImageTokenBoost(alpha=0.0)),
    ],
)
def test_contract(make, idle):
    check_intervention(make, idle, llava(), picture_prompt())


def test_tokens_are_those_of_the_vision_tower():
    model, inputs = llava(), picture_prompt()
    maps: dict[int, torch.Tensor] = {}
    rows: dict[str, list[torch.Tensor]] = {"before": [], "after": []}

    class Look(Handler):
        def __init__(self, name):
            self.name = name

        def logits(self, site, logits):
            if "vision" in site.name:
                maps[site.layer] = logits.softmax(-1)
            elif site.layer == 2:
                rows[self.name].append(logits)
            return logits

    steer = InformedTokenBoost(alpha=0.5, beta=0.25, local_ratio=0.4, layers=[2])
    with torch.no_grad(), tap(model, Look("before")), steer(model), tap(model, Look("after")):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    local, summary = informed_tokens(
        maps[0][:, :, 0, 1:].sum(1), maps[1][:, :, 0, 1:].sum(1), local_ratio=0.4
    )
    coefficient = torch.zeros(2, 16)
    coefficient[inputs["input_ids"] == IMAGE] = (0.5 * local + 0.25 * summary).flatten()
    assert local.any()
    assert len(rows["before"]) == 3
    for before, after in zip(rows["before"], rows["after"], strict=True):
        padded = torch.nn.functional.pad(coefficient, (0, before.shape[-1] - 16))
        assert torch.equal(after, boost(before, padded))


def test_all_tokens_with_one_strength_is_the_boost_of_all():
    model, inputs = llava(), picture_prompt()
    image = inputs["input_ids"] == IMAGE
    local = image & (torch.arange(16) < 7)
    with torch.no_grad():
        with ImageTokenBoost(alpha=0.5)(model):
            wanted = model(**inputs).logits
        with InformedTokenBoost(alpha=0.5, beta=0.5, local=local, summary=image & ~local)(model):
            assert torch.equal(model(**inputs).logits, wanted)


def test_beams_share_their_image():
    model, inputs = llava(), picture_prompt()
    with torch.no_grad(), InformedTokenBoost(alpha=0.9, beta=0.9)(model):
        wanted = model.generate(**inputs, max_new_tokens=3, num_beams=3, do_sample=False)
        one = {name: value[1:] for name, value in inputs.items()}
        found = model.generate(**one, max_new_tokens=3, num_beams=3, do_sample=False)
        without = model.generate(**one, max_new_tokens=3, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(found, wanted[1:])
    assert torch.equal(without, found)


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="local_ratio is 2, must lie in"):
        InformedTokenBoost(local_ratio=2)
    with pytest.raises(ValueError, match="must be both or none"):
        InformedTokenBoost(local=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must have a vision tower"), InformedTokenBoost()(llama()):
        pass
    model, inputs = llava(), picture_prompt()
    wrong = InformedTokenBoost(image=torch.arange(16).expand(2, 16) < 5)
    with wrong(model), pytest.raises(ValueError, match=r"has 18 patches .* which are 10"):
        model(**inputs)
    with ImageTokenBoost()(model := llama()), pytest.raises(ValueError, match="has none of image_token_id"):
        model(**words())
