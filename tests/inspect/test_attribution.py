"""Attributions where theory knows the answer, and against loops over their definitions."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import transformers as hf
from torch import nn

import heedful
from heedful import inspect as look
from heedful.hf import Handler, tap
from heedful.inspect import Attribution, Target
from tests.test_tap import made

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64


def on(value, x, baseline=None, fixed=None):
    zeros = torch.zeros_like(x) if baseline is None else baseline
    return Target(value, x, zeros, [f"t{i}" for i in range(len(x))], fixed)


def curved(parts=6, width=4, seed=0):
    """A target that is no plane: every part meets every other."""
    torch.manual_seed(seed)
    x, b, w = (torch.randn(parts, width, dtype=torch.float64) for _ in range(3))
    fixed = torch.arange(parts) == 2

    def value(x):
        return (torch.tanh(x * w).sum((1, 2)) + (x[:, 1:] * x[:, :-1]).sum((1, 2))).exp().log1p()

    return on(value, 0.5 * x, 0.5 * b, fixed)


def linear():
    torch.manual_seed(1)
    x, b, w = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    return on(lambda x: (x * w).sum((1, 2)) + 2, x, b), ((x - b) * w).sum(-1)


def test_all_agree_where_the_number_is_a_plane():
    target, own = linear()
    for found in (
        look.gradient_times_input(target),
        look.integrated_gradients(target, steps=2),
        look.occlusion(target),
        look.lime(target, ridge=1e-9),
    ):
        torch.testing.assert_close(found.scores, own, rtol=1e-6, atol=1e-6)
    assert found.order.tolist() == own.argsort(descending=True).tolist()


def test_gradient_by_differences():
    target, h = curved(), 1e-6
    size, times = look.gradient(target).scores, look.gradient_times_input(target).scores
    for j in range(6):
        slope = []
        for c in range(4):
            step = torch.zeros_like(target.x)
            step[j, c] = h
            up, down = target.value(torch.stack([target.x + step, target.x - step]))
            slope.append(((up - down) / (2 * h)).item())
        assert size[j].item() == pytest.approx(math.sqrt(sum(s * s for s in slope)), rel=1e-5)
        along = sum(s * (target.x[j, c] - target.baseline[j, c]).item() for c, s in enumerate(slope))
        assert times[j].item() == pytest.approx(0 if j == 2 else along, rel=1e-5)


def test_integrated_gradients_share_out_everything():
    target = curved()
    found = look.integrated_gradients(target)
    assert found.scores[2] == 0 and found.scores.abs().max() > 0.1
    assert abs(look.completeness_gap(target, found)) < 1e-9
    assert abs(look.completeness_gap(target, look.gradient_times_input(target))) > 0.1
    # A fine sum of rectangles along the way.
    start, total = target.x - target.change, torch.zeros_like(target.x)
    for k in range(4000):
        total += target.gradient((start + (k + 0.5) / 4000 * target.change)[None])[0] / 4000
    torch.testing.assert_close(found.scores, (target.change * total).sum(-1), rtol=1e-5, atol=1e-6)


def test_occlusion_one_by_one():
    target = curved()
    whole = target.value(target.x[None]).item()
    for j, score in enumerate(look.occlusion(target).scores.tolist()):
        x = target.x.clone()
        if j != 2:
            x[j] = target.baseline[j]
        assert score == pytest.approx(whole - target.value(x[None]).item(), abs=1e-12)


def test_lime_is_a_weighted_ridge_regression():
    from sklearn.linear_model import Ridge

    target, seen = curved(), []
    value = target.value
    object.__setattr__(target, "value", lambda x: (seen.append(x), value(x))[1])
    found = look.lime(target, samples=200, ridge=0.7)
    x = torch.cat(seen)
    free = [0, 1, 3, 4, 5]
    z = (x == target.x).all(-1)[:, free].double()
    assert z.shape == (200, 5) and z[0].all() and (x[:, 2] == target.x[2]).all()
    cosine = z.sum(1) / (z.norm(dim=1) * math.sqrt(5)).clamp(min=1e-12)
    weight = torch.exp(-((1 - cosine) ** 2) / 0.25**2 / 2)
    weight = weight / weight.mean()
    fit = Ridge(alpha=0.7).fit(z.numpy(), value(x).numpy(), sample_weight=weight.numpy())
    torch.testing.assert_close(found.scores[free], torch.from_numpy(fit.coef_), **EXACT)
    assert found.scores[2] == 0


def last_logit(token):
    return lambda output: output.logits[:, -1, token]


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_text_models_as_they_are(family):
    model, inputs = made(family)
    model = model.double()
    inputs = {key: x[:1] for key, x in inputs.items()}
    score = last_logit(3) if family != "bert" else lambda output: output.pooler_output[:, 5]
    fixed = torch.arange(8) == 0
    target = look.text_target(model, inputs, score, fixed=fixed)
    own = score(model(**inputs)).item()
    assert target.with_all() == pytest.approx(own, rel=1e-6)
    pad = model.config.pad_token_id
    words = torch.full((8, 16), 0.0).double()
    if pad is not None:
        words = model.get_input_embeddings()(torch.full((8,), pad)).detach()
    words[0] = model.get_input_embeddings()(inputs["input_ids"])[0, 0].detach()
    nothing = score(model(inputs_embeds=words[None], attention_mask=inputs["attention_mask"])).item()
    assert target.with_none() == pytest.approx(nothing, rel=1e-6)
    found = look.integrated_gradients(target, steps=256 if family == "gemma2" else 64)
    assert found.scores[0] == 0
    assert abs(look.completeness_gap(target, found)) < 1e-3 * found.magnitude.sum()
    assert len(look.occlusion(target).scores) == 8
    assert all(p.grad is None for p in model.parameters())


class TurnUp(Handler):
    """All attention to one token is turned up by a share."""

    def __init__(self, token, by):
        self.token, self.by = token, by

    def weights(self, site, weights):
        return torch.cat(
            [
                weights[..., : self.token],
                (1 + self.by) * weights[..., self.token, None],
                weights[..., self.token + 1 :],
            ],
            -1,
        )


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_attention_times_gradient_is_what_turning_up_attention_does(family):
    model, inputs = made(family)
    model, inputs = model.double(), {key: x[:1] for key, x in inputs.items()}
    score = last_logit(3) if family != "bert" else lambda output: output.pooler_output[:, 5]
    target = look.text_target(model, inputs, score)
    found = look.attention_times_gradient(model, target)
    for token in (0, 3, 7):
        with torch.no_grad():
            turned = []
            for by in (1e-2, -1e-2):  # Llama's norms are float32, which small steps drown in
                with tap(model, TurnUp(token, by)):
                    turned.append(score(model(**inputs)).item())
        assert found.scores[token].item() == pytest.approx((turned[0] - turned[1]) / 2e-2, rel=1e-3, abs=2e-6)
    assert found.scores.abs().max() > 1e-5


def attend(query, key, value, *_, **more):
    """Attention whose table is kept in the graph."""
    table = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    table.retain_grad()
    TABLES.append(table)
    return table @ value


TABLES: list[torch.Tensor] = []


def by_tables(monkeypatch, run):
    """A dF/dA summed, by tables in the graph of `run`."""
    TABLES.clear()
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        run().backward()
    return sum((t * t.grad).sum((0, 1, 2)) for t in TABLES).detach()


def test_attention_times_gradient_of_timm(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, embed_dim=12, num_heads=3).eval()
    pixels = torch.randn(1, 3, 48, 48)
    target = look.image_target(model, pixels, lambda logits: logits[:, 7], grid=(3, 3))
    found = look.attention_times_gradient(model, target)
    assert found.grid == (3, 3) and found.map().shape == (3, 3)
    own = by_tables(monkeypatch, lambda: model(pixels)[0, 7])
    assert len(TABLES) == 2
    torch.testing.assert_close(found.scores, own[1:], rtol=1e-4, atol=1e-6)  # float32


@pytest.mark.parametrize("mixer", [False, True])
def test_attention_times_gradient_of_plain_modules(mixer, monkeypatch):
    torch.manual_seed(0)
    if mixer:
        layers = [heedful.create("self-attention", dim=12, heads=3) for _ in range(2)]
        model = nn.Sequential(*layers).eval()
    else:
        layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(5, 12)
    target = on(lambda x: model(x)[:, 1, 4], x)
    found = look.attention_times_gradient(model, target)
    own = by_tables(monkeypatch, lambda: target.value(x[None].requires_grad_())[0])
    assert len(TABLES) == 2 and own.abs().max() > 1e-3
    torch.testing.assert_close(found.scores, own, rtol=1e-4, atol=1e-6)  # float32


def test_images_by_patches():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = hf.ViTConfig(**sizes, image_size=24, patch_size=8)
    model = hf.ViTForImageClassification(config).eval().double()
    pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    target = look.image_target(model, pixels, lambda output: output.logits[:, 0], grid=(3, 3))
    assert target.grid == (3, 3) and target.tokens[5] == "2,3"
    assert target.with_all() == pytest.approx(model(pixels).logits[0, 0].item())
    black = pixels.clone()
    black[:, :, 8:16, 16:] = 0
    wanted = (model(pixels).logits - model(black).logits)[0, 0].item()
    assert look.occlusion(target).map()[1, 2].item() == pytest.approx(wanted, abs=1e-9)
    found = look.integrated_gradients(target, steps=128)  # layer norms turn sharply near the baseline
    assert abs(look.completeness_gap(target, found)) < 1e-4 * found.magnitude.sum()


def test_deletion_and_insertion_by_hand():
    """A sum of parts 4, 1, 3, 2 of which the third stays."""
    x = torch.tensor([[4.0], [1], [3], [2]])
    target = on(lambda x: x.sum((1, 2)), x, fixed=torch.tensor([False, False, True, False]))
    best = look.occlusion(target)
    assert best.scores.tolist() == [4, 1, 0, 2]
    out, back = look.deletion_curve(target, best), look.insertion_curve(target, best)
    assert out.values.tolist() == [10, 6, 4, 3] and back.values.tolist() == [3, 7, 9, 10]
    torch.testing.assert_close(out.shares, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert out.area == pytest.approx((10 / 2 + 6 + 4 + 3 / 2) / 3)
    assert out.between(3, 10).area == pytest.approx((1 / 2 + 3 / 7 + 1 / 7) / 3)
    worst = Attribution("worst", target.tokens, -best.scores)
    assert look.deletion_curve(target, worst).area > out.area
    assert look.insertion_curve(target, worst).area < back.area
    few = look.deletion_curve(target, best, steps=2)
    assert few.values.tolist() == [10, 4, 3]  # 0, 2 and 3 parts


def test_deletion_of_features_by_a_quality():
    saliency = torch.tensor([[1.0, 5], [0, 3]])
    asked = []

    def quality(kept):
        asked.append(kept.tolist())
        return float(kept.sum())

    assert look.deletion_auc(saliency, quality, steps=4) == pytest.approx((4 / 2 + 3 + 2 + 1) / 4)
    assert asked[1] == [[True, False], [True, True]] and asked[2] == [[True, False], [True, False]]


@pytest.mark.door
def test_errors_at_the_door():
    target, _ = linear()
    with pytest.raises(ValueError, match=r"scores have shape \(2,\), must be \(1,\)"):
        Attribution("x", ["a"], torch.zeros(2))
    with pytest.raises(ValueError, match=r"grid is \(2, 2\), must have 1 places"):
        Attribution("x", ["a"], torch.zeros(1), (2, 2))
    with pytest.raises(ValueError, match="this is the attribution of a text"):
        Attribution("x", ["a"], torch.zeros(1)).map()
    with pytest.raises(ValueError, match=r"both must be \(5, c\)"):
        on(target.value, target.x, target.baseline[:4])
    with pytest.raises(ValueError, match="attribution has 1 scores, must have 5"):
        look.deletion_curve(target, Attribution("x", ["a"], torch.zeros(1)))
    with pytest.raises(ValueError, match="steps is 0"):
        look.integrated_gradients(target, steps=0)
    model, inputs = made("bert")
    with pytest.raises(ValueError, match="input_ids of one text"):
        look.text_target(model, inputs, lambda output: output[0][:, 0, 0])
    with pytest.raises(ValueError, match="must take inputs_embeds"):
        look.text_target(nn.Linear(2, 2), {"input_ids": torch.zeros(1, 2)}, lambda output: output[:, 0])
    with pytest.raises(ValueError, match="height divided by 4 and a width by 4"):
        look.image_target(nn.Flatten(), torch.zeros(1, 3, 10, 12), lambda output: output[:, 0], grid=(4, 4))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    seen = look.image_target(plain, torch.zeros(1, 3, 2, 2), lambda output: output[:, 0], grid=(2, 2))
    nothing = pytest.raises(ValueError, match="shows no self-attention over the 4 parts")
    with pytest.warns(UserWarning, match="no attention call"), nothing:
        look.attention_times_gradient(plain, seen)
