"""Perturbed heads: interpolations by loops, guidance by hand, and the search."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf

from heedful.hf import Handler, tap
from heedful.steer import CurvedPerturbedHeads, PerturbedAttentionGuidance, PerturbedHeads, head_hunter
from heedful.steer.headhunter_softpag import PATHS, annealed, image_identity, linear
from tests.steer.contract import check_intervention
from tests.steer.models import llama, sharpened, words


def attention(n: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(2, 3, n, n, dtype=torch.float64, generator=generator)).softmax(-1)


def transcription(path, a, u):
    n, t = len(a), 1 - u
    new = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        theta = math.acos(math.sqrt(a[i, i]))
        for j in range(n):
            own, x = float(i == j), float(a[i, j])
            if path == "fisher_rao":
                new[i, j] = ((1 - t) * own + t * math.sqrt(x)) ** 2
            elif path == "slerp":
                new[i, j] = (
                    math.sin((1 - t) * theta) / math.sin(theta) * own
                    + math.sin(t * theta) / math.sin(theta) * math.sqrt(x)
                ) ** 2
            else:
                p0 = own * (1 - 1e-6 * (n - 1)) + 1e-6
                new[i, j] = p0 ** (1 - t) * max(x, 1e-12) ** t
        if path != "slerp":
            new[i] /= new[i].sum()
    return new


@pytest.mark.parametrize("path", PATHS)
def test_interpolations_equal_transcription(path):
    a = attention()
    for u in (0.3, 0.75):
        found = PATHS[path](a, u)
        torch.testing.assert_close(found[1, 2], transcription(path, a[1, 2], u))
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    torch.testing.assert_close(PATHS[path](a, 0.0), a)
    torch.testing.assert_close(PATHS[path](a, 1.0), torch.eye(7, dtype=torch.float64).expand_as(a))
    row = PATHS[path](a[:, :, 5:6], 0.4, offset=5)  # a step with a cache
    torch.testing.assert_close(row, PATHS[path](a, 0.4)[:, :, 5:6])


def test_a_row_that_is_the_identity_stays():
    a = torch.eye(4, dtype=torch.float64)[None, None]
    for path in PATHS.values():
        torch.testing.assert_close(path(a, 0.3), a, atol=1e-5, rtol=0)  # log-linear smooths by 1e-6


def test_annealing_takes_the_maximum_of_the_row():
    logits = torch.tensor([[1.0, -torch.inf], [3.0, 2.0]])[None, None]
    found = annealed(logits, 0.25)
    assert torch.equal(found[0, 0], torch.tensor([[1.0, -torch.inf], [2.25, 2.25]]))
    assert torch.equal(annealed(logits, 0.0), logits)


def test_identity_between_image_tokens():
    a, image = attention(5), torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]).bool()
    for text in ("keep", "drop"):
        for renormalise in (False, True):
            found = image_identity(a, image, text=text, renormalise=renormalise)
            for b in range(2):
                for i in range(5):
                    mass = a[b, 0, i, image[b]].sum() if renormalise else 1.0
                    for j in range(5):
                        wanted = a[b, 0, i, j]
                        if image[b, i] and (image[b, j] or text == "drop"):
                            wanted = mass * float(i == j)
                        assert float(found[b, 0, i, j]) == pytest.approx(float(wanted))


class Heads(Handler):
    """What the heads of layer 1 put out, and their own values."""

    def output(self, site, output):
        if site.layer == 1:
            self.out, self.own = output, site.value.repeat_interleave(2, dim=1)
        return output


def test_perturbed_heads_put_out_their_own_values():
    model, inputs = llama(), words()
    before, after = Heads(), Heads()
    with torch.no_grad(), tap(model, before), PerturbedHeads({1: [0, 3]}, 0.4)(model), tap(model, after):
        model(**inputs)
    assert torch.equal(after.out[:, 1:3], before.out[:, 1:3])
    wanted = before.out + 0.4 * (before.own - before.out)
    torch.testing.assert_close(after.out[:, [0, 3]], wanted[:, [0, 3]])


@pytest.mark.parametrize("path", [*PATHS, "annealed"])
def test_perturbation_does_not_look_ahead(path):
    model, ids = llama(), words()["input_ids"][:1]
    with torch.no_grad(), CurvedPerturbedHeads({1: None, 2: [1]}, 0.5, path)(model):
        whole = model(input_ids=ids).logits
        step = model(input_ids=ids[:, :6], use_cache=True)
        rest = model(input_ids=ids[:, 6:], past_key_values=step.past_key_values).logits
    torch.testing.assert_close(torch.cat([step.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)  # float32


def test_linear_heads_are_the_linear_path():
    a = attention()
    v = torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(a, 0.3) @ v, a @ v + 0.3 * (v - a @ v))


@pytest.mark.parametrize(
    ("make", "idle"),
    [
        (lambda: PerturbedHeads({1: [0]}), lambda: PerturbedHeads({1: [0]}, 0.0)),
        (lambda: CurvedPerturbedHeads({1: [0]}, 0.5), lambda: CurvedPerturbedHeads({1: [0]}, 0.0)),
        (
            lambda: PerturbedAttentionGuidance(PerturbedHeads({1: [0], 2: None})),
            lambda: PerturbedAttentionGuidance(PerturbedHeads({1: [0]}), 0.0),
        ),
    ],
)
def test_contract(make, idle):
    check_intervention(make, idle, llama(), words())


def test_guidance_by_hand():
    model, inputs = llama(), words()
    perturbed = PerturbedHeads({1: [0], 2: [1, 2]}, 0.7)
    with torch.no_grad():
        with PerturbedAttentionGuidance(perturbed, alpha=1.5)(model):
            found = model(**inputs).logits
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            assert torch.equal(
                model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False), written
            )
        main = model(**inputs).logits
        with perturbed(model):
            other = model(**inputs).logits
    torch.testing.assert_close(found, 2.5 * main - 1.5 * other)


def test_guidance_of_a_classifier_of_images():
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        num_labels=5,
    )
    model = sharpened(hf.ViTForImageClassification(config))
    pixels = torch.randn(2, 3, 12, 12)
    perturbed = PerturbedHeads({1: None})
    with torch.no_grad():
        main = model(pixel_values=pixels).logits
        with perturbed(model):
            other = model(pixel_values=pixels).logits
        with PerturbedAttentionGuidance(perturbed, 2.0)(model):
            torch.testing.assert_close(model(pixel_values=pixels).logits, 3 * main - 2 * other)
    assert not torch.allclose(main, other)


def test_search_takes_the_best_of_each_round():
    worth = {(0, 0): 1.0, (0, 1): 5.0, (1, 0): 4.0, (1, 1): 4.5}
    tried = []

    def objective(heads):
        tried.append(heads)
        chosen = {(layer, h) for layer, found in heads.items() for h in found}
        clash = 3.0 if {(0, 1), (1, 1)} <= chosen else 0.0  # good alone, not together
        return sum(worth[c] for c in chosen) - clash

    assert head_hunter(worth, objective, rounds=2, keep=1) == [(0, 1), (1, 0)]
    assert tried[0] == {0: [0]}
    assert len(tried) == 7
    assert head_hunter(worth, objective, rounds=1, keep=2) == [(0, 1), (1, 1)]


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"u is 1.5, must lie in \[0, 1\]"):
        PerturbedHeads({0: None}, 1.5)
    with pytest.raises(ValueError, match="path is 'line', must be one of"):
        CurvedPerturbedHeads({0: None}, path="line")
    with PerturbedHeads({1: [4]})(model := llama()), pytest.raises(ValueError, match="must be below 4"):
        model(**words())
    with pytest.raises(ValueError, match="rounds is 0"):
        head_hunter([], len, rounds=0)
