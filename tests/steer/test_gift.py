"""Gaze shift guidance: its formulas by loops, and its place in a model."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from heedful.hf import Handler, tap
from heedful.steer import GazeShiftGuidance
from heedful.steer.gift import amplification, enhance, gaze_shift
from tests.steer.contract import check_intervention
from tests.steer.models import llava, picture_prompt


def maps(seed: int, n: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 5, n, n, dtype=torch.float64, generator=generator)
    return logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


IMAGE = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).bool()
QUESTION = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]]).bool()
CONTENT = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0]]).bool()


def places(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def largest(sums: list[float]) -> list[int]:
    return sorted(range(len(sums)), key=lambda h: -sums[h])[: len(sums) // 2]


def saliency(layers, b, alpha):
    """The numbered steps, for one sample."""
    image, words = places(IMAGE[b]), places(CONTENT[b])
    found = {j: [] for j in image}
    for a in layers:
        d = [
            [[max(0.0, float(a[b, h, i, j] - a[b, h, i - 1, j])) for j in image] for i in words]
            for h in range(5)
        ]
        for h in largest([sum(map(sum, rows)) for rows in d]):
            for row in d[h]:
                for j, value in zip(image, row, strict=True):
                    found[j].append(value)
    m = [sum(found[j]) / len(found[j]) for j in image]
    mean, std = statistics.mean(m), statistics.stdev(m)
    m = [min(max(x, mean - 3 * std), mean + 3 * std) for x in m]
    return [math.exp(alpha * (x - min(m)) / (max(m) - min(m))) for x in m]


def test_saliency_equals_transcription():
    layers = [maps(1), maps(2)]
    factors = amplification(gaze_shift(layers, IMAGE, CONTENT), IMAGE, 3.0)
    for b in range(2):
        wanted = torch.tensor(saliency(layers, b, 3.0))
        torch.testing.assert_close(factors[b, IMAGE[b]], wanted, rtol=1e-5, atol=1e-5)  # float32
        assert wanted.min() == 1.0
        assert wanted.max() == pytest.approx(math.exp(3))
    assert factors[~IMAGE].eq(1).all()


def test_outliers_are_clipped():
    shift, image = torch.zeros(1, 40), torch.ones(1, 40, dtype=torch.bool)
    shift[0, 0], shift[0, 1] = 100.0, 1.0
    bound = float(shift.mean() + 3 * shift.std())
    assert amplification(shift, image, 1.0)[0, 1].item() == pytest.approx(math.exp(1 / bound), rel=1e-5)


def test_nothing_to_go_by_changes_nothing():
    shift = gaze_shift([maps(1)], IMAGE, torch.zeros_like(CONTENT))
    assert not shift.any()
    assert amplification(shift, IMAGE, 5.0).eq(1).all()
    assert torch.equal(
        enhance(maps(3).float(), torch.ones(2, 12), IMAGE, QUESTION)[:, :, :-1], maps(3).float()[:, :, :-1]
    )


def test_enhancement_equals_transcription():
    a = maps(3)
    draw = torch.rand(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    factors = torch.where(IMAGE, 1 + 4 * draw, 1.0)
    found = enhance(a, factors, IMAGE, QUESTION)
    assert torch.equal(found[:, :, :-1], a[:, :, :-1])
    touched = 0
    for b in range(2):
        last = a[b, :, -1].tolist()
        image, question = places(IMAGE[b]), places(QUESTION[b])
        vision = largest([sum(row[j] for j in image) for row in last])
        old = sum(last[h][j] for h in vision for j in image)
        for h in vision:
            for j in image:
                last[h][j] *= float(factors[b, j])
        gain = sum(last[h][j] for h in vision for j in image) / old
        asked = largest([sum(row[k] for k in question) for row in last])
        for h in asked:
            for k in question:
                last[h][k] *= gain
        for h in range(5):
            if h not in (*vision, *asked):
                assert torch.equal(found[b, h], a[b, h])
                touched += 1
            wanted = torch.tensor(last[h], dtype=torch.float64) / sum(last[h])
            torch.testing.assert_close(found[b, h, -1], wanted)
    assert touched


def content(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand(ids.shape) >= 13


def settings(alpha: float, **how) -> GazeShiftGuidance:
    return GazeShiftGuidance(content, alpha, [1], how.pop("enhance_layers", [1, 2]), **how)


def test_contract():
    check_intervention(lambda: settings(3.0), lambda: settings(0.0), llava(), picture_prompt())


def test_saliency_is_that_of_the_model_left_alone():
    model, inputs = llava(), picture_prompt()
    plain: dict[int, torch.Tensor] = {}
    rows: dict[str, list[torch.Tensor]] = {"before": [], "after": []}

    class Look(Handler):
        def __init__(self, name):
            self.name = name

        def weights(self, site, weights):
            if "language" in site.name:
                plain.setdefault(site.layer, weights)
                if site.layer == 2 and self.name in rows:
                    rows[self.name].append(weights)
            return weights

    with torch.no_grad():
        with tap(model, Look("none")):
            model(**inputs)
        with tap(model, Look("before")), settings(3.0)(model), tap(model, Look("after")):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
    image = inputs["input_ids"] == 29
    factors = amplification(gaze_shift([plain[1]], image, content(image)), image, 3.0)
    question = torch.arange(16).expand(2, 16) >= 12
    assert len(rows["before"]) == 3
    for before, after in zip(rows["before"], rows["after"], strict=True):
        more = before.shape[-1] - 16
        masks = (torch.nn.functional.pad(x, (0, more)) for x in (image, question))
        wanted = enhance(before, torch.nn.functional.pad(factors, (0, more), value=1.0), *masks)
        torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after.sum(-1), before.sum(-1))


@pytest.mark.door
def test_errors():
    model, inputs = llava(), picture_prompt()
    bare = GazeShiftGuidance(content)
    with pytest.raises(ValueError, match=r"saliency_layers is None, .* must be given"), bare(model):
        pass
    steer = GazeShiftGuidance(torch.ones(2, 5, dtype=torch.bool), 3.0, [1], [2])
    with steer(model), pytest.raises(ValueError, match=r"content has shape \(2, 5\)"):
        model(**inputs)
