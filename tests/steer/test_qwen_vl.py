"""Interventions on models whose images are grids of any shape, seen by a tower without a class token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from heedful.hf import Handler, tap
from heedful.inspect.attention_saliency import attention_saliency, candidate_saliency
from heedful.inspect.sinks import find_sink_dims, find_sink_tokens
from heedful.steer import (
    AssemblyDecoding,
    AttentionCalibration,
    GazeShiftGuidance,
    ImageFreeContrast,
    ImageTokenBoost,
    InformedTokenBoost,
    LocalCoherenceBoost,
    OutlierTokenContrast,
    SaliencyGuidedRejection,
    VisionHeadReinforcement,
    VisualAttentionReallocation,
    VisualAttentionRedistribution,
    answer_attention,
    contrastive_attention_crop,
    token_grid,
)
from heedful.steer.paint import boost
from tests.steer.contract import check_intervention
from tests.steer.models import IMAGE, llava, picture_prompt, qwen_prompt, qwen_vl

KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
INPUTS = qwen_prompt()  # images of 2 x 3 and of 2 x 2 tokens
ON_IMAGE = INPUTS["input_ids"] == IMAGE
LENGTH = ON_IMAGE.shape[1]
MARKS = [27, 28, IMAGE, 30]  # tokens about images, which are not to be written
PLACE = torch.arange(LENGTH).expand_as(ON_IMAGE)
OTHER = {"pixel_values": INPUTS["pixel_values"].sin() * 2, "image_grid_thw": INPUTS["image_grid_thw"]}


def reallocation(factor):
    steer = VisualAttentionReallocation(4, images=2)
    with torch.no_grad():
        steer.factors.fill_(factor)
    return steer


def redistribution(keep):
    return VisualAttentionRedistribution(
        keep=keep,
        threshold=1.2,
        min_nonsink_ratio=0.1,
        min_image_share=0.05,
        first_layer=1,
        skip_last_layer=False,
    )


def informed(strength):
    local = ON_IMAGE & (PLACE % 2 == 0)
    return InformedTokenBoost(strength, strength / 2, local=local, summary=ON_IMAGE & ~local)


def gaze(alpha):
    return GazeShiftGuidance(lambda ids: PLACE[: ids.shape[0]] >= LENGTH - 3, alpha, [1], [1, 2])


# name: (the intervention of a strength, a strength that acts, the one that does not)
STEER = {
    "visual-attention-redistribution": (redistribution, 0.3, 1.0),
    "vision-head-reinforcement": (lambda a: VisionHeadReinforcement(a, layers=[1, 3]), 2.0, 1.0),
    "gaze-shift-guidance": (gaze, 3.0, 0.0),
    "assembly-decoding": (lambda a: AssemblyDecoding(OTHER, a, 0.0), 2.0, 0.0),
    "image-token-boost": (ImageTokenBoost, 0.9, 0.0),
    "informed-token-boost": (informed, 0.9, 0.0),
    "image-free-contrast": (lambda a: ImageFreeContrast(a, 0.0), 1.5, 0.0),
    "visual-attention-reallocation": (reallocation, 1.7, 1.0),
    "local-coherence-boost": (lambda b: LocalCoherenceBoost(b, 3, layers=[1, 2], prompt=9), 2.0, 0.0),
    "attention-calibration": (lambda b: AttentionCalibration(beta=b, threshold=0.12), 0.2, 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STEER)
def test_contract(kind, name):
    make, acting, idle = STEER[name]
    check_intervention(lambda: make(acting), lambda: make(idle), qwen_vl(kind), INPUTS)


# Those whose settings are not tied to the places of these tokens, or to both images.
TIED = {"assembly-decoding", "informed-token-boost", "gaze-shift-guidance", "local-coherence-boost"}
FREE = [name for name in STEER if name not in TIED]


@pytest.mark.parametrize("name", FREE)
def test_padding_is_nobodys_business(name):
    """A row of a padded batch is steered as it is alone."""
    model, (make, acting, _) = qwen_vl("qwen2_vl"), STEER[name]
    with torch.no_grad():
        with make(acting)(model):
            both = model(**INPUTS).logits
        for row in range(2):
            with make(acting)(model):
                alone = model(**sample(row)).logits[0]
            real = INPUTS["attention_mask"][row].bool()
            torch.testing.assert_close(both[row, real], alone, rtol=1e-3, atol=1e-3)  # float32


class Look(Handler):
    """What the decoder's layers have at the prompt and at each step after it."""

    def __init__(self):
        self.logits_of, self.weights_of = [], []

    def wants(self, site):
        return "language_model" in site.name

    def logits(self, site, logits):
        self.logits_of.append((site.layer, logits))
        return logits

    def weights(self, site, weights):
        self.weights_of.append((site.layer, weights))
        return weights


def before_and_after(kind, steer, steps=3):
    """Logits and weights that an intervention finds, and those that it leaves, call by call."""
    model, before, after = qwen_vl(kind), Look(), Look()
    with torch.no_grad(), tap(model, before), steer(model), tap(model, after):
        model.generate(**INPUTS, max_new_tokens=steps, do_sample=False)
    for one, two in zip(
        zip(before.logits_of, before.weights_of, strict=True),
        zip(after.logits_of, after.weights_of, strict=True),
        strict=True,
    ):
        yield one[0][0], one[0][1], two[0][1], one[1][1], two[1][1]


def wide(x, m, value=0):
    return torch.nn.functional.pad(x, (0, m - x.shape[1]), value=value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["image-token-boost", "informed-token-boost"])
def test_boosts_reach_each_rows_own_image_tokens(kind, name):
    local = ON_IMAGE & (PLACE % 2 == 0)
    share = 0.9 * ON_IMAGE if name == "image-token-boost" else 0.9 * local + 0.45 * (ON_IMAGE & ~local)
    calls = 0
    for layer, before, after, _, _ in before_and_after(kind, STEER[name][0](0.9)):
        if layer >= 2:
            torch.testing.assert_close(after, boost(before, wide(share, before.shape[-1])))
            calls += 1
        else:
            assert torch.equal(after, before)
    assert calls == 2 * 3


@pytest.mark.parametrize("kind", KINDS)
def test_reallocation_scales_image_columns_of_the_first_layer(kind):
    calls = 0
    for layer, before, after, _, _ in before_and_after(kind, reallocation(1.7)):
        scaled = wide(ON_IMAGE, before.shape[-1])[:, None, None] & (layer == 0) & before.isfinite()
        torch.testing.assert_close(after, torch.where(scaled, 1.7 * before, before))
        calls += 1
    assert calls == 4 * 3


def sinks_of(hidden):
    """By the channels in which the first token is largest that is no padding."""
    first = INPUTS["attention_mask"].argmax(1).tolist()
    rows = [
        find_sink_tokens(row[None], dims=find_sink_dims(row[begin:]), threshold=1.2)
        for row, begin in zip(hidden, first, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_redistribution_moves_attention_from_sinks_to_image_tokens(kind):
    rows = (torch.where(ON_IMAGE, PLACE, -1).amax(-1, keepdim=True) < PLACE)[:, None]
    hidden: list[torch.Tensor] = []
    model = qwen_vl(kind)
    model.get_decoder().layers[1].register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    with torch.no_grad():
        model(**INPUTS)
    moved = 0
    for layer, _, _, before, after in before_and_after(kind, redistribution(0.3)):
        torch.testing.assert_close(after.sum(-1), before.sum(-1))
        less, more = after < before * (1 - 1e-4), after > before * (1 + 1e-4)
        on_image = wide(ON_IMAGE, before.shape[-1])[:, None, None]
        assert not (more & ~on_image).any()  # what is freed goes to the image alone
        if layer == 0:
            assert torch.equal(after, before)
        if layer == 1:  # nothing before it has changed
            sinks = wide(sinks_of(hidden[0]), before.shape[-1])[:, None, None]
            assert not (less & ~sinks).any()
            assert not (more & sinks).any()
        if before.shape[2] > 1:
            assert not ((less | more).any(-1) & ~rows).any()
        moved += int(more.sum())
    assert moved


@pytest.mark.parametrize("kind", KINDS)
def test_gaze_shift_amplifies_the_image_of_the_newest_token(kind):
    changed = 0
    for layer, _, _, before, after in before_and_after(kind, gaze(3.0)):
        if layer not in (1, 2):
            assert torch.equal(after, before)
            continue
        on_image = wide(ON_IMAGE, before.shape[-1])[:, None]
        assert torch.equal(after[:, :, :-1], before[:, :, :-1])
        torch.testing.assert_close(after.sum(-1), before.sum(-1))
        ratio = after[:, :, -1] / before[:, :, -1].clamp_min(1e-30)
        heads = ratio.masked_fill(~on_image, 0).amax(-1) > ratio.masked_fill(on_image, 0).amax(-1) * 1.01
        changed += int(heads.sum())
    assert changed


@pytest.mark.parametrize("kind", KINDS)
def test_reinforced_heads_are_half_of_each_rows(kind):
    model, steer = qwen_vl(kind), VisionHeadReinforcement(2.0, layers=[1, 3])
    with torch.no_grad():
        with steer(model):
            found = model(**INPUTS).logits
            gains = dict(steer._gains)
        for row in range(2):
            with VisionHeadReinforcement(2.0, layers=[1, 3])(model):
                alone = model(**sample(row)).logits[0]
            real = INPUTS["attention_mask"][row].bool()
            torch.testing.assert_close(found[row, real], alone, rtol=1e-3, atol=1e-3)  # float32
    assert {float(g.sum()) for g in gains[1]} == {6.0}  # two of four heads


def sample(row: int, more: tuple[int, ...] = (), **changes) -> dict[str, torch.Tensor]:
    """A row of the prompt without padding, and tokens after it."""
    real = INPUTS["attention_mask"][row].bool()
    ids = torch.cat([INPUTS["input_ids"][row, real], torch.tensor(more, dtype=torch.long)])[None]
    sizes = INPUTS["image_grid_thw"].prod(-1).tolist()
    told = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": INPUTS["pixel_values"].split(sizes)[row],
        "image_grid_thw": INPUTS["image_grid_thw"][row : row + 1],
    }
    return told | changes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["assembly-decoding", "image-free-contrast"])
def test_two_streams_equal_models_without_caches(kind, name):
    model, alpha = qwen_vl(kind), 1.5
    steer = AssemblyDecoding(OTHER, alpha, 0.1) if "assembly" in name else ImageFreeContrast(alpha, 0.1)
    sizes = INPUTS["image_grid_thw"].prod(-1).tolist()
    with torch.no_grad():
        with steer(model):
            found = model.generate(**INPUTS, max_new_tokens=4, do_sample=False, suppress_tokens=MARKS)
        for row in range(2):
            for step in range(4):
                given = sample(row, tuple(found[row, LENGTH : LENGTH + step].tolist()))
                main = model(**given).logits[0, -1]
                if "assembly" in name:
                    given["pixel_values"] = OTHER["pixel_values"].split(sizes)[row]
                    z = main + alpha * model(**given).logits[0, -1]
                else:
                    words = given["input_ids"][:, given["input_ids"][0] != IMAGE]
                    z = (1 + alpha) * main - alpha * model(input_ids=words).logits[0, -1]
                z[main < math.log(0.1) + main.max()] = -math.inf
                z[MARKS] = -math.inf
                assert found[row, LENGTH + step] == z.argmax()


def two_images() -> dict[str, torch.Tensor]:
    """The first row has both images, the second one of its own."""
    inputs, more = qwen_prompt(((4, 6), (4, 8))), qwen_prompt(((4, 4),))
    ids = torch.cat([more["input_ids"].expand(2, -1), inputs["input_ids"]], dim=1)
    ids[1, : more["input_ids"].shape[1]] = 0
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.cat([more["pixel_values"], inputs["pixel_values"]]),
        "image_grid_thw": torch.cat([more["image_grid_thw"], inputs["image_grid_thw"]]),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["assembly-decoding", "image-free-contrast", "image-token-boost"])
def test_beams_with_several_images_a_row(kind, name):
    """Beams of a batch are those of its rows alone, and need no cache."""
    model, inputs = qwen_vl(kind), two_images()

    def steer(images):
        if name != "assembly-decoding":
            return STEER[name][0](0.9)
        return AssemblyDecoding({**images, "pixel_values": images["pixel_values"].sin()}, 0.9, 0.0)

    how = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False, "suppress_tokens": MARKS}
    images = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        with steer(images)(model):
            wanted = model.generate(**inputs, **how)
        for row, (grids, pixels) in enumerate([(slice(0, 2), slice(0, 40)), (slice(2, 3), slice(40, 72))]):
            mine = {
                "pixel_values": inputs["pixel_values"][pixels],
                "image_grid_thw": inputs["image_grid_thw"][grids],
            }
            words = {k: v[row : row + 1] for k, v in inputs.items() if k not in mine}
            with steer(mine)(model):
                assert torch.equal(model.generate(**words, **mine, **how), wanted[row : row + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_saliency_while_writing_is_that_of_eager_attention(kind):
    """Later candidates too: the places of text after an image go on from the image's."""
    model, eager, seen = qwen_vl(kind), qwen_vl(kind), []
    eager.set_attn_implementation("eager")
    steer = SaliencyGuidedRejection(layers=(1, 2), generator=torch.Generator().manual_seed(3))
    judge = steer._judge

    def spy():
        found = judge()
        seen.append((steer.reading.ids.clone(), found(3)))
        return found

    steer._judge = spy
    with steer(model):
        model.generate(**sample(0), max_new_tokens=3, do_sample=False)
    assert len(seen) == 3
    count = sample(0)["input_ids"].shape[1]
    for ids, saliency in seen:
        out = eager(**sample(0, tuple(ids[0, count:].tolist())), output_attentions=True)
        weights = [out.attentions[layer] for layer in (1, 2)]
        gradients = torch.autograd.grad(-out.logits[0, -1].log_softmax(-1)[3], weights)
        layers = [attention_saliency(a[0], g[0]) for a, g in zip(weights, gradients, strict=True)]
        begin = int((ids[0] == IMAGE).nonzero().max()) + 1
        wanted = candidate_saliency(layers, ids.shape[1] - 1, begin)
        assert saliency == pytest.approx(wanted, rel=1e-3)  # float32


@pytest.mark.parametrize("kind", KINDS)
def test_an_answers_attention_and_its_grid(kind):
    model, look = qwen_vl(kind), Look()
    inputs = sample(0)
    found = answer_attention(model, inputs, max_new_tokens=3)
    with torch.no_grad(), tap(model, look):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    image, count = inputs["input_ids"][0] == IMAGE, inputs["input_ids"].shape[1]
    wanted = torch.stack([w[0, :, -1].mean(0)[:count][image] for _, w in look.weights_of])
    torch.testing.assert_close(found, wanted.reshape(3, 4, 6))
    assert token_grid(model, inputs) == (2, 3)
    pixels = Image.fromarray(np.random.default_rng(0).integers(1, 255, (8, 12, 3), dtype=np.uint8))
    part = contrastive_attention_crop(
        pixels, found, found.flip(0), grid=token_grid(model, inputs), layers=[1, 2]
    )
    assert part.width >= 12
    assert part.height >= 8


@pytest.mark.door
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_model_does_not_tell_is_asked_for(kind):
    model = qwen_vl(kind)
    for steer, asked in (
        (OutlierTokenContrast(1.0, 3), "of Qwen.* must have a class token"),
        (InformedTokenBoost(), "must have a class token.* give the local and the summary tokens"),
    ):
        with steer(model), pytest.raises(ValueError, match=asked):
            model(**INPUTS)
    with pytest.raises(ValueError, match="layers is None, must be given"), VisionHeadReinforcement()(model):
        pass
    bare = GazeShiftGuidance(lambda ids: ids > 0)
    with pytest.raises(ValueError, match=r"saliency_layers is None, .* must be given"), bare(model):
        pass
    lacking = AssemblyDecoding(OTHER["pixel_values"])
    with lacking(model), pytest.raises(ValueError, match="pixels has no image_grid_thw"):
        model.generate(**INPUTS, max_new_tokens=1)
    three = {name: torch.cat([x, x, x]) for name, x in OTHER.items()}
    with AssemblyDecoding(three)(model), pytest.raises(ValueError, match="pixels holds 6 images, must hold"):
        model.generate(**INPUTS, max_new_tokens=1)
    with pytest.raises(ValueError, match="tells of 2 images, must tell of one"):
        token_grid(model, INPUTS)
    attention = torch.rand(2, 4, 6)
    with pytest.raises(ValueError, match=r"grid is not known, .*the 6 image tokens make no square"):
        contrastive_attention_crop(Image.new("RGB", (4, 4)), attention, attention, layers=[1])
    with pytest.raises(ValueError, match=r"layers is range\(20, 26\), must name layers of the 4"):
        contrastive_attention_crop(Image.new("RGB", (4, 4)), attention, attention, grid=(2, 3))


def test_the_grid_of_a_square_image():
    assert token_grid(llava(), picture_prompt(1)) == (3, 3)


@pytest.mark.parametrize("name", STEER)
def test_a_static_cache_is_as_good(name):
    model, (make, acting, _) = qwen_vl("qwen2_vl"), STEER[name]
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), make(acting)(model):
        found = model.generate(**INPUTS, **how)
        static = model.generate(**INPUTS, **how, cache_implementation="static")
    torch.testing.assert_close(static.logits, found.logits, rtol=1e-3, atol=1e-3)  # float32
