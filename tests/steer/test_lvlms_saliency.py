"""Saliency by the model's own weights and gradients, rejection by hand, local coherence by loops."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.inspect.attention_saliency import attention_saliency, candidate_saliency
from heedful.steer import LocalCoherenceBoost, SaliencyGuidedRejection
from heedful.steer.lvlms_saliency import boost_recent
from tests.steer.contract import _hooks, check_intervention
from tests.steer.models import llama, llava, picture_prompt, words


def test_saliency_equals_transcription():
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(3, 5, 5, dtype=torch.float64, generator=generator).tril() for _ in range(2))
    row, matrix = (attention_saliency(a, g, norm=n) for n in ("row", "matrix"))
    s = [[sum(abs(float(a[h, i, j] * g[h, i, j])) for h in range(3)) / 3 for j in range(5)] for i in range(5)]
    whole = math.sqrt(sum(x * x for r in s for x in r))
    for i in range(5):
        for j in range(5):
            assert float(row[i, j]) == pytest.approx(s[i][j] / math.sqrt(sum(x * x for x in s[i])))
            assert float(matrix[i, j]) == pytest.approx(s[i][j] / whole)
    torch.testing.assert_close(attention_saliency(a, 9 * g), row)
    assert not row.triu(1).any()
    assert candidate_saliency([row, matrix], 4, 1) == pytest.approx(
        float((row[4, 1:4].mean() + matrix[4, 1:4].mean()) / 2)
    )
    assert candidate_saliency([row], 2, 2) == 1.0


def settings(**how) -> SaliencyGuidedRejection:
    how.setdefault("generator", torch.Generator().manual_seed(3))
    return SaliencyGuidedRejection(layers=(1, 2), **how)


def one_prompt() -> dict[str, torch.Tensor]:
    return picture_prompt(1)


@pytest.mark.parametrize("norm", ["row", "matrix"])
def test_saliency_of_a_candidate_is_that_of_eager_attention(norm):
    """The candidate is appended and its loss taken, as in the paper, with the model's own weights."""
    model, inputs = llava(), one_prompt()
    steer = settings(norm=norm)
    with steer(model):
        model(**inputs)
        judge = steer._judge()
        found = {token: judge(token) for token in (3, 8)}
    eager = llava()
    eager.set_attn_implementation("eager")
    for token, saliency in found.items():
        ids = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        out = eager(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True)
        for a in out.attentions:
            a.retain_grad()
        torch.nn.functional.cross_entropy(out.logits[0, -2:-1], torch.tensor([token])).backward()
        layers = []
        for layer in (1, 2):
            a = out.attentions[layer]
            # Without the candidate's own row, whose gradient is zero.
            layers.append(attention_saliency(a[0], a.grad[0], norm=norm)[:-1, :-1])
        assert saliency == pytest.approx(candidate_saliency(layers, 15, 12), rel=1e-3)  # float32


def test_a_draw_is_repeated_below_the_threshold():
    steer = settings(draws=3, alpha=0.5, history=2)
    scores = torch.tensor([0.0, 3.0, 2.9, 2.8, 2.7, 2.6])
    table = {1: 0.2, 2: 0.3, 3: 0.25, 4: 0.1, 5: 0.15}
    steer._judge = lambda: table.get
    steer._accepted = [9.0, 0.3, 0.1]  # a threshold of 0.1 from the last two: all pass
    generator = torch.Generator().manual_seed(3)
    p = scores[1:].softmax(0)
    first = 1 + int(torch.multinomial(p, 1, generator=generator))
    assert steer._choose(scores) == first
    assert steer._accepted[-1] == table[first]
    steer._accepted = [2.0, 2.0]  # none passes: the most salient of three draws
    steer.generator.manual_seed(3)
    tried = []
    steer._judge = lambda: lambda token: tried.append(token) or table[token]
    chosen = steer._choose(scores)
    assert len(tried) == len(set(tried)) == 3
    assert table[chosen] == max(table[t] for t in tried)
    assert steer._accepted[-1] == table[chosen]


def test_one_candidate_is_greedy_and_the_model_stays_as_it_was():
    model, inputs = llava(), one_prompt()
    how = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        logits = model(**inputs).logits
        greedy = model.generate(**inputs, **how)
        hooks = _hooks(model)
        with settings(candidates=1)(model):
            assert torch.equal(model.generate(**inputs, **how), greedy)
        with settings()(model):
            first = model.generate(**inputs, **how)
        with settings()(model):
            assert torch.equal(model.generate(**inputs, **how), first)
            for step in range(5):  # only likely tokens
                likely = model(first[:, : 16 + step], pixel_values=inputs["pixel_values"]).logits
                assert likely[0, -1].isfinite().sum() == 1
        with pytest.raises(IndexError), settings()(model):
            model(input_ids=torch.tensor([[99]]))
        assert torch.equal(model(**inputs).logits, logits)
        for step in range(5):
            likely = model(input_ids=first[:, : 16 + step], pixel_values=inputs["pixel_values"]).logits[0, -1]
            assert first[0, 16 + step] in likely.topk(5).indices
    assert all(p.grad is None for p in model.parameters())
    assert _hooks(model) == hooks


def test_boost_of_recent_output_equals_transcription():
    logits = torch.randn(1, 2, 6, 9, dtype=torch.float64)
    logits = logits.masked_fill(torch.ones(6, 9, dtype=torch.bool).triu(4), -torch.inf)
    found = boost_recent(logits, 4, beta=0.5, window=2).softmax(-1)
    plain = logits.softmax(-1)
    for i in range(6):
        q = 3 + i
        row = [float(plain[0, 1, i, j]) for j in range(9)]
        for j in range(4, q):
            if q - 1 - j <= 2:
                row[j] *= 1.5
        torch.testing.assert_close(found[0, 1, i], torch.tensor(row, dtype=torch.float64) / sum(row))


def test_contract():
    def make(beta: float = 2.0) -> LocalCoherenceBoost:
        return LocalCoherenceBoost(beta, 3, layers=[1, 2], prompt=4)

    check_intervention(make, lambda: make(0.0), llama(), words())


def test_a_prompt_is_no_output():
    model, inputs = llama(), words()
    with torch.no_grad():
        plain = model(**inputs, use_cache=True)
        with LocalCoherenceBoost(2.0, 3, layers=[1])(model):
            found = model(**inputs, use_cache=True)
            torch.testing.assert_close(found.logits[:, -1], plain.logits[:, -1], rtol=1e-4, atol=1e-4)
            written = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with LocalCoherenceBoost(2.0, 3, layers=[1], prompt=10)(model):  # the same, in one piece
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
            again = model(input_ids=written[:, :15], attention_mask=mask).logits[:, 9:].argmax(-1)
    assert torch.equal(again, written[:, 10:])


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="norm is 'all', must be one of"):
        settings(norm="all")
    with pytest.raises(ValueError, match="beta is -1, must be above -1"):
        LocalCoherenceBoost(-1)
    with pytest.raises(ValueError, match="must name layers of the 4"), LocalCoherenceBoost()(llama()):
        pass
    with settings()(model := llava()), pytest.raises(ValueError, match="input_ids has 2 rows, must have one"):
        model(**picture_prompt())
    one = {name: value[:1] for name, value in words().items()}
    with settings()(model := llama()), pytest.raises(ValueError, match="has none of image_token_id"):
        model(**one)
