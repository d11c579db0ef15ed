"""Vision-aware heads: divergence by loops, and reinforcement beside two streams run again and again."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from heedful.hf import Handler, tap
from heedful.inspect import token_vhd, vision_head_divergence
from heedful.steer import VisionHeadReinforcement, VisualAttentionRedistribution
from tests.steer.contract import check_intervention
from tests.steer.models import IMAGE, llama, llava, picture_prompt, words


def transcription(seen, unseen, rule=True):
    """Equations 4 and 6 for one layer."""
    d = [math.dist(a, b) for a, b in zip(seen.tolist(), unseen.tolist(), strict=True)]
    size = [sum(x * x for x in b) for b in unseen.tolist()]
    far = statistics.mean(d) + statistics.stdev(d)
    large = statistics.mean(size) + statistics.stdev(size)
    return [0.0 if rule and x > far and s > large else x for x, s in zip(d, size, strict=True)]


def outputs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=generator)


def test_divergence_equals_transcription():
    seen, unseen = outputs(0), outputs(1)
    unseen[0, :, 2] *= 9  # a head that surges without the image
    found, plain = (vision_head_divergence(seen, unseen, outliers=o) for o in (False, True))
    for layer in range(2):
        for b in range(3):
            for rule, d in ((True, found), (False, plain)):
                wanted = transcription(seen[layer, b], unseen[layer, b], rule)
                torch.testing.assert_close(d[layer, b], torch.tensor(wanted, dtype=torch.float64))
    assert found[0, 1:, 2].eq(0).all()
    assert plain[0, :, 2].gt(0).all()
    wanted = [sum(sum(sorted(plain[layer, b].tolist())[-2:]) for layer in range(2)) for b in range(3)]
    torch.testing.assert_close(token_vhd(plain, 2), torch.tensor(wanted, dtype=torch.float64))


class Heads(Handler):
    """Scales chosen heads and keeps what all put out at the last position."""

    def __init__(self, gains: dict[int, torch.Tensor]):
        self.gains, self.last = gains, {}

    def wants(self, site):
        return "vision" not in site.name

    def output(self, site, output):
        self.last[site.layer] = output[0, :, -1]
        gain = self.gains.get(site.layer)
        return output if gain is None else output * gain[:, None, None]


def by_hand(model, inputs, layers, alpha):
    """Algorithm 1 for one sample, each layer with two whole forwards."""
    ids = inputs["input_ids"]
    gains: dict[int, torch.Tensor] = {}
    for layer in layers:
        both = []
        for given in (inputs, {"input_ids": ids[ids != IMAGE][None]}):
            heads = Heads(gains)
            with tap(model, heads):
                model(**given)
            both.append(heads.last[layer])
        d = transcription(*both)
        middle = sorted(d)[1]  # the lower of the two middle ones of four heads
        gains[layer] = torch.tensor([alpha if x > middle else 1.0 for x in d])
    with tap(model, Heads(gains)):
        return model(**inputs).logits, gains


def settings(alpha: float = 2.0) -> VisionHeadReinforcement:
    return VisionHeadReinforcement(alpha, layers=[1, 3])


def test_equals_the_algorithm_sample_by_sample():
    model, inputs = llava(), picture_prompt(3)
    steer = settings()
    with torch.no_grad():
        with steer(model):
            found = model(**inputs).logits
            gains = dict(steer._gains)
        for b in range(3):
            real = inputs["attention_mask"][b].bool()
            one = {
                "input_ids": inputs["input_ids"][b, real][None],
                "pixel_values": inputs["pixel_values"][b : b + 1],
            }
            wanted, chosen = by_hand(model, one, [1, 3], 2.0)
            for layer in (1, 3):
                assert torch.equal(gains[layer][b], chosen[layer])
            torch.testing.assert_close(found[b, real], wanted[0], rtol=1e-4, atol=1e-4)  # float32
    assert {float(g.sum()) for g in gains[1]} == {6.0}  # two of four heads


def test_contract():
    check_intervention(settings, lambda: settings(1.0), llava(), picture_prompt())


def test_generation_with_a_cache_is_generation_without():
    model, inputs = llava(), picture_prompt()
    how = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), settings()(model):
        with_cache = model.generate(**inputs, **how)
        step = model(**inputs, use_cache=True)
        token = step.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        more = model(input_ids=token, attention_mask=mask, past_key_values=step.past_key_values)
    assert torch.equal(token[:, 0], with_cache[:, 16])
    assert torch.equal(more.logits[:, -1].argmax(-1), with_cache[:, 17])


def test_another_intervention_does_not_see_the_forward_without_the_image():
    model, inputs = llava(), picture_prompt()

    def sinks() -> VisualAttentionRedistribution:
        return VisualAttentionRedistribution(
            keep=0.3, threshold=1.2, min_nonsink_ratio=0.1, min_image_share=0.05, first_layer=1
        )

    one, both = sinks(), sinks()
    with torch.no_grad():
        with one(model):
            model(**inputs)
            wanted = one._sinks[1]
        with settings()(model), both(model):
            model(**inputs)
            assert torch.equal(both._sinks[1], wanted)
        with sinks()(model), settings()(model):
            assert model(**inputs).logits.isfinite().all()


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="layers is None, must be given"), VisionHeadReinforcement()(llava()):
        pass
    with settings()(model := llama()), pytest.raises(ValueError, match="has none of image_token_id"):
        model(**words())
    with pytest.raises(ValueError, match="k is 9, must be at most 6"):
        token_vhd(torch.rand(2, 1, 6), 9)
