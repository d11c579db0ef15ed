"""Assembly decoding: relevance and masks by loops, and generation beside two runs by hand."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.steer import AssemblyDecoding
from heedful.steer.agla import assemble, prompt_relevance, relevance_mask, smooth_map
from tests.steer.contract import check_intervention
from tests.steer.models import llama, llava, picture_prompt, words


def test_relevance_equals_transcription():
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(2, 3, 6, 13, dtype=torch.float64, generator=generator)
    g = torch.randn(2, 3, 6, 13, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    found = prompt_relevance(c, g, mask, (3, 4))
    for b, n in ((0, 4), (1, 2)):
        for y in range(3):
            for x in range(4):
                j = 1 + 4 * y + x
                cam = [
                    sum(float(c[b, h, t, j] * max(g[b, h, t, j], 0)) for h in range(3)) / 3 for t in range(6)
                ]
                assert float(found[b, y, x]) == pytest.approx(sum(cam[1 : n + 1]) / n)


def test_mask_keeps_fewer_pixels_of_what_is_alike():
    maps = torch.rand(3, 20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    similarity = torch.tensor([0.5, 0.9, -0.2])
    kept = relevance_mask(maps, similarity).flatten(1).sum(1).tolist()
    for count, s in zip(kept, similarity.tolist(), strict=True):
        assert count == int(600 * min(1 - s / 2, 1 - 1e-5)) + 1
    assert kept[1] < kept[0] < kept[2]
    assert (
        maps[0][relevance_mask(maps, similarity)[0]].min()
        > maps[0][~relevance_mask(maps, similarity)[0]].max()
    )


def test_smooth_map():
    relevance = torch.zeros(1, 6, 6, dtype=torch.float64)
    relevance[0, 2, 4] = 3.0
    found = smooth_map(relevance, (48, 48))[0]
    assert found.min() == 0
    assert found.max() == 1
    y, x = divmod(int(found.argmax()), 48)
    assert 16 <= y < 24
    assert 32 <= x < 40
    torch.testing.assert_close(smooth_map(7 * relevance + 2, (48, 48))[0], found)
    sharp = smooth_map(relevance, (6, 6), sigma=0.0)  # nothing to resize, nothing to blur
    torch.testing.assert_close(sharp, relevance / 3)


def other_picture(batch: int = 2) -> torch.Tensor:
    return picture_prompt(batch)["pixel_values"] * (torch.arange(12) < 5)


def settings(alpha: float = 2.0, beta: float = 0.0) -> AssemblyDecoding:
    return AssemblyDecoding(other_picture(), alpha, beta)


def test_contract():
    check_intervention(settings, lambda: settings(0.0), llava(), picture_prompt())


def test_the_same_image_is_a_temperature():
    model, inputs = llava(), picture_prompt()
    with torch.no_grad():
        plain = model(**inputs).logits
        with AssemblyDecoding(inputs["pixel_values"], 2.0, 0.0)(model):
            torch.testing.assert_close(model(**inputs).logits, 3 * plain)
    kept = assemble(plain, plain, 2.0, 0.5).isfinite()
    p = plain.softmax(-1)
    assert torch.equal(kept, p >= 0.5 * p.amax(-1, keepdim=True))


def test_generation_equals_two_streams_without_caches():
    model, inputs = llava(), picture_prompt()
    how = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), settings(beta=0.1)(model):
        found = model.generate(**inputs, **how)
    with torch.no_grad(), settings()(model):
        beams = model.generate(**inputs, **how, num_beams=2)
        assert torch.equal(model.generate(**inputs, **how, num_beams=2, use_cache=False), beams)
    for b in range(2):
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool()][None]
        for step in range(4):
            with torch.no_grad():
                main, other = (
                    model(input_ids=ids, pixel_values=pixels[b : b + 1]).logits[0, -1]
                    for pixels in (inputs["pixel_values"], other_picture())
                )
            z = main + 2 * other
            z[main < math.log(0.1) + main.max()] = -math.inf
            assert found[b, 16 + step] == z.argmax()
            ids = torch.cat([ids, z.argmax()[None, None]], dim=1)


@pytest.mark.door
def test_errors():
    with settings()(model := llama()), pytest.raises(ValueError, match="given no pixel_values"):
        model(**words())
    wrong = AssemblyDecoding(torch.zeros(2, 3, 8, 8))
    with wrong(model := llava()), pytest.raises(ValueError, match=r"pixels has shape \(2, 3, 8, 8\)"):
        model(**picture_prompt())
