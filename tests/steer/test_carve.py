"""Contrastive attention crop: its steps by loops and brute force, on arrays, pictures and a model."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image

from heedful.hf import Handler, tap
from heedful.inspect.visual_contrast import color_complexity, contrast_attention, visual_attention_entropy
from heedful.steer import answer_attention, contrastive_attention_crop
from heedful.steer.carve import bounding_box, components, fuse_contrast, region_mask
from tests.steer.models import IMAGE, llava, picture_prompt


def maps(steps: int, seed: int) -> torch.Tensor:
    return torch.rand(steps, 3, 12, generator=torch.Generator().manual_seed(seed)) + 0.1


def test_fusion_equals_transcription():
    question, general = maps(3, 0), maps(2, 1)
    found = fuse_contrast(question, general, grid=(3, 4), size=(4, 3), layers=[0, 2])  # nothing to resize
    wanted = np.zeros((3, 4))
    for t in range(2):
        for layer in (0, 2):
            for j in range(12):
                wanted[j // 4, j % 4] += (t + 1) * float(
                    question[t, layer, j] / (general[t, layer, j] + 1e-8)
                )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)  # float32 ratios
    first = fuse_contrast(question, general, grid=(3, 4), size=(4, 3), layers=[0, 2], first_step=True)
    one = fuse_contrast(question[:1], general, grid=(3, 4), size=(4, 3), layers=[0, 2])
    np.testing.assert_array_equal(first, one)
    assert torch.allclose(contrast_attention(question, question), torch.ones(()))


def test_components_are_connected_by_edges():
    mask = np.array([[1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0], [1, 0, 1, 1]], dtype=bool)
    labels, count = components(mask)
    assert count == 5
    assert labels.tolist() == [[1, 0, 2, 2], [0, 3, 0, 2], [0, 3, 0, 0], [4, 0, 5, 5]]
    noise = np.random.default_rng(0).random((20, 30)) < 0.5
    labels, count = components(noise)
    again = np.where(noise, np.arange(600).reshape(20, 30) + 1, 0)
    for _ in range(600):  # the smallest number spreads to neighbours until nothing changes
        wide = np.pad(again, 1)
        near = [wide[1:-1, 1:-1], wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]]
        again = np.where(noise, np.min(np.where(np.array(near) == 0, 601, near), axis=0), 0)
    assert count == len(np.unique(again)) - 1
    assert len({*zip(labels.ravel().tolist(), again.ravel().tolist(), strict=True)}) == count + 1


def test_masks_rank_regions():
    fused = np.zeros((10, 10))
    fused[0, :3] = 1.0  # large in size
    fused[4, 4:6] = 5.0  # large in sum
    fused[9, 9] = 2.0
    how = {"share": 0.06, "regions": 1}
    assert region_mask(fused, **how).nonzero()[0].tolist() == [4, 4]
    assert region_mask(fused, rank="size", **how).nonzero()[0].tolist() == [0, 0, 0]
    assert region_mask(fused, rank="large", least_percent=2.0, **how).sum() == 5
    assert region_mask(fused, share=0.06).sum() == 6
    scaled = region_mask(7 * fused, **how)
    assert np.array_equal(scaled, region_mask(fused, **how))
    assert bounding_box(scaled) == (4, 4, 6, 5)
    assert bounding_box(np.zeros((3, 5), dtype=bool)) == (0, 0, 5, 3)


def test_crop_shows_what_the_question_looks_at():
    pixels = np.random.default_rng(0).integers(1, 255, (40, 40, 3), dtype=np.uint8)
    question = torch.full((2, 1, 16), 0.01)
    question[:, :, [5, 6]] = 1.0  # second row of the grid
    part = contrastive_attention_crop(
        Image.fromarray(pixels), question, torch.full((2, 1, 16), 0.01), layers=[0], share=0.1, regions=1
    )
    assert part.size == (80, 40)  # two tokens of a row, as high as the image was
    with pytest.raises(ValueError, match="grid is"):
        contrastive_attention_crop(Image.fromarray(pixels), maps(1, 0), maps(1, 1), layers=[0])


def test_attention_of_an_answer():
    model, inputs = llava(), picture_prompt(1)
    rows: list[torch.Tensor] = []

    class Look(Handler):
        def weights(self, site, weights):
            if "language" in site.name:
                rows.append(weights[0, :, -1])
            return weights

    image = inputs["input_ids"][0] == IMAGE
    found = answer_attention(model, inputs, max_new_tokens=3)
    with torch.no_grad(), tap(model, Look()):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    wanted = torch.stack([row.mean(0)[:16][image] for row in rows]).reshape(3, 4, 9)
    torch.testing.assert_close(found, wanted)
    assert model.config._attn_implementation != "heedful-tap"
    with pytest.raises(ValueError, match="inputs holds 2 samples, must hold one"):
        answer_attention(model, picture_prompt(2))


def test_measures():
    a = torch.rand(2, 5, dtype=torch.float64)
    wanted = sum(-float(x) * math.log(float(x)) for x in a.flatten()) / 2
    assert float(visual_attention_entropy(a)) == pytest.approx(wanted)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3))
    counts = np.zeros(180)
    for r, g, b in pixels.reshape(-1, 3):
        counts[int(colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)[0] * 180 + 1e-9) % 180] += 1
    p = counts[counts > 0] / 64
    found = color_complexity(torch.from_numpy(pixels).permute(2, 0, 1).double())
    assert found == pytest.approx(float(-(p * np.log(p)).sum() / math.log(180)), abs=0.02)  # bin edges
    assert color_complexity(torch.ones(3, 4, 4)) == 0.0


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="rank is 'sum', must be one of"):
        region_mask(np.eye(3), rank="sum")
    with pytest.raises(ValueError, match=r"share is 0, must lie in \(0, 1\]"):
        region_mask(np.eye(3), share=0)
