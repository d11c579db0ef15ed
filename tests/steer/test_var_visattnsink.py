"""Visual attention redistribution: its formulas by loops, and its place in a model."""

from __future__ import annotations

import pytest
import torch

from heedful.hf import Handler, tap
from heedful.inspect.sinks import find_sink_dims, sink_score
from heedful.steer import VisualAttentionRedistribution
from heedful.steer.var_visattnsink import redistribute
from tests.steer.contract import check_intervention
from tests.steer.models import llama, llava, picture_prompt, words


def transcription(a, image, sinks, ratio, least, keep):
    a, new, chosen = a.tolist(), a.clone(), torch.zeros(a.shape[:3], dtype=torch.bool)
    for b, heads in enumerate(a):
        vis = [j for j in range(image.shape[1]) if image[b, j]]
        sink = [j for j in range(image.shape[1]) if sinks[b, j]]
        both = [j for j in vis if j in sink]
        for h, rows in enumerate(heads):
            for i, row in enumerate(rows):
                share = sum(row[j] for j in both) / sum(row[j] + 1e-6 for j in vis)
                chosen[b, h, i] = 1 - share >= ratio and sum(row[j] for j in vis) >= least
                others = [j for j in vis if j not in sink]
                if not chosen[b, h, i] or not both or sum(row[j] for j in others) == 0:
                    continue
                budget = (1 - keep) * sum(row[j] for j in sink)
                for j in sink:
                    new[b, h, i, j] = keep * row[j]
                for j in others:
                    new[b, h, i, j] += budget * row[j] / sum(row[k] for k in others)
    return new, chosen


def test_redistribution_equals_transcription():
    generator = torch.Generator().manual_seed(0)
    a = (3 * torch.randn(2, 3, 5, 11, dtype=torch.float64, generator=generator)).softmax(-1)
    image = torch.zeros(2, 11, dtype=torch.bool)
    image[0, 2:7], image[1, 4:9] = True, True
    sinks = torch.zeros_like(image)
    sinks[0, [0, 3, 5]], sinks[1, [0, 10]] = True, True  # the second row has no sink on its image
    found = redistribute(a, image, sinks, min_nonsink_ratio=0.6, min_image_share=0.3, keep=0.25)
    wanted = transcription(a, image, sinks, 0.6, 0.3, 0.25)
    torch.testing.assert_close(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert 0 < found[1][0].sum() < 15
    torch.testing.assert_close(found[0].sum(-1), a.sum(-1))
    assert torch.equal(found[0][1], a[1])
    assert torch.equal(redistribute(a, image, image)[0], a)  # all of the image is sinks


def test_sink_score():
    x = torch.tensor([[[3.0, 0.0, -4.0, 1.0]]])
    norm = (26 / 4 + 1e-6) ** 0.5
    assert sink_score(x, (0, 1)).item() == pytest.approx(3 / norm)
    assert sink_score(x, (0, 2)).item() == pytest.approx(4 / norm)
    assert find_sink_dims(x[0]) == [2, 0]


def settings(keep: float) -> VisualAttentionRedistribution:
    return VisualAttentionRedistribution(
        keep=keep,
        threshold=1.2,
        min_nonsink_ratio=0.1,
        min_image_share=0.05,
        first_layer=1,
        skip_last_layer=False,
    )


def test_contract():
    check_intervention(lambda: settings(0.3), lambda: settings(1.0), llava(), picture_prompt())


def test_only_rows_after_the_image_change_and_sums_stay():
    model, inputs = llava(), picture_prompt()
    found: dict[str, dict[int, torch.Tensor]] = {"before": {}, "after": {}}

    class Look(Handler):
        def __init__(self, name):
            self.name = name

        def weights(self, site, weights):
            if "language" in site.name and site.layer == 1:
                found[self.name][weights.shape[2]] = weights
            return weights

    with torch.no_grad(), tap(model, Look("before")), settings(0.3)(model), tap(model, Look("after")):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    before, after = found["before"][16], found["after"][16]
    assert torch.equal(before[:, :, :12], after[:, :, :12])
    assert not torch.allclose(before[:, :, 12:], after[:, :, 12:])
    torch.testing.assert_close(before.sum(-1), after.sum(-1))
    assert not torch.allclose(found["before"][1], found["after"][1])  # a generated token


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"keep is 1.5, must lie in \[0, 1\]"):
        VisualAttentionRedistribution(keep=1.5)
    steer = settings(0.3)
    with pytest.raises(ValueError, match="has none of image_token_id"), steer(model := llama()):
        model(**words())
    with steer(model), pytest.raises(ValueError, match="in use already"), steer(model):
        pass
