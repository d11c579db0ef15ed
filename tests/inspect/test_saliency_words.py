"""Snippets against loops over the definition, the released code's findings, and what sentences say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from heedful.inspect import (
    Attribution,
    Sample,
    Snippet,
    SnippetSearch,
    Subject,
    saliency_prompt,
    saliency_words,
)
from heedful.inspect.explanation_section import _in_words
from heedful.inspect.explanations import explain
from tests.test_tap import made

# Twenty tokens, and what the released code (DFKI-NLP/SMV, 8e7c4b3) finds in them: its golden file.
TOLD = [0.702, -0.109, 1.111, -0.46, -0.131, 0.668, 0.225, 1.201, 0.294, -0.117]
TOLD += [0.011, -0.346, -0.439, 0.515, 0.491, 0.847, -0.177, 1.045, 0.056, 0.987]
MAP = torch.tensor(TOLD, dtype=torch.float64)
WORDS = [f"w{i}" for i in range(20)]
RELEASED = {(15, 17): 0.7876769, (5, 7): 0.7781016, (2, 5): 0.7406328, (0, 2): 0.7547877}
RELEASED_SPANS = {
    (15, 16, 17): 0.4759922,
    (13, 14, 15, 16, 17): 0.4531224,
    (13, 14, 15): 0.5142936,
    (6, 7, 8): 0.4773800,
    (5, 6, 7): 0.5811823,
}


def of(snippets):
    return {snippet.places: snippet.score for snippet in snippets}


def thresholds(a):
    highest = np.sort(a)[::-1]
    return {"mean": highest[: int(len(a) * 0.4)].mean(), "quantile": 0.4 * a.std(), "variance": 0.4 * a.var()}


def loops(scores, filters, metric, sign, ends):
    """The numbered steps of the search: every filter at every start."""
    a = scores.numpy() / (scores.max().item() if scores.max() > 0 else scores.abs().max().item())
    threshold = thresholds(a)[metric]
    found = {}
    for f in filters:
        for s in range(ends):
            products = [f[j] * a[s + j] for j in range(len(f))]
            if sign == "+" and any(p < 0 for p in products):
                continue
            if sign == "-" and any(p >= 0 for p in products):
                continue
            mean = sum(products) / sum(f)
            if mean > threshold:
                found[tuple(s + j for j in range(len(f)) if f[j])] = mean
    return found


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sign", ["+", "-", None])
@pytest.mark.parametrize("metric", ["mean", "quantile", "variance"])
def test_searches_by_loops(metric, sign, legacy):
    for seed, length in ((0, 5), (1, 7)):
        scores = torch.randn(23, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if sign == "-":
            scores = scores.sort().values - 4  # all are below 0, and the highest stand together
        search = SnippetSearch(metric, 0.4, sign, length, legacy)
        ends = 23 - length + (0 if legacy else 1)
        every = itertools.product((0, 1), repeat=length)
        filters = [f for f in every if 1 < sum(f) < length - 1]
        runs = [
            tuple(int(abs(j - length // 2) <= run // 2) for j in range(length))
            for run in range(3, length + 1, 2)
        ]
        for found, rows in ((search.convolution(scores), filters), (search.spans(scores), runs)):
            assert of(found) == pytest.approx(loops(scores, rows, metric, sign, ends))
            values = [snippet.score for snippet in found]
            assert values == sorted(values, reverse=True) and len(of(found)) == len(found)
        if sign != "-":
            assert len(search.convolution(scores)) > 3
        elif metric == "mean" and not legacy:
            assert search.spans(scores)


def test_released_findings():
    found = SnippetSearch(legacy=True).convolution(MAP)
    assert of(found) == pytest.approx(RELEASED, abs=1e-6)  # which are float32
    assert not SnippetSearch(legacy=True).spans(MAP)
    every = SnippetSearch("quantile", 1.0, None, legacy=True)
    assert of(every.spans(MAP)) == pytest.approx(RELEASED_SPANS, abs=1e-6)
    assert len(every.convolution(MAP)) == 32
    positive = SnippetSearch("quantile", 1.0, legacy=True)
    assert len(positive.convolution(MAP)) == 23
    assert list(of(positive.spans(MAP))) == [(5, 6, 7), (13, 14, 15), (6, 7, 8)]
    # In the legacy way single tokens cover nothing, so that the first five are as good as any.
    assert saliency_words(WORDS, MAP, search=positive) == (
        "The phrase » w0 w1 w2 w3 w4 w5 w6 w7 w8 « is most important for the prediction."
    )


def test_last_window_and_last_token_count():
    search = SnippetSearch("quantile", 1.0, None)
    legacy = SnippetSearch("quantile", 1.0, None, legacy=True)
    more = of(search.convolution(MAP)).keys() - of(legacy.convolution(MAP)).keys()
    assert more and all(19 in places for places in more)
    positive = MAP.clamp(min=0).sum()
    (span,) = [s for s in search.spans(MAP) if s.places == (5, 6, 7)]
    assert span.coverage == pytest.approx((MAP[5:8].sum() / positive).item())
    assert search.tokens(MAP)[0] == Snippet((7,), 1.0, (MAP[7] / positive).item())


def test_number_of_filters():
    """Where everything stands out, every filter makes a snippet at the one start."""
    flat = SnippetSearch("variance", 0.0)
    assert len(flat.convolution(torch.ones(5))) == 20 and len(flat.spans(torch.ones(5))) == 2
    assert len(SnippetSearch("variance", 0.0, length=8).convolution(torch.ones(8))) == 238


def test_a_token_of_zero_changes_no_coverage():
    search = SnippetSearch("mean", 0.1)
    more = torch.cat([MAP, torch.zeros(1, dtype=MAP.dtype)])
    before = {s.places: s.coverage for s in search.tokens(MAP)}
    after = {s.places: s.coverage for s in search.tokens(more)}
    assert after == pytest.approx({**before, (20,): 0.0})


def test_summary_by_hand():
    """The snippets are in places 1 to 3 and 8 and 9; only the upper quarter by coverage is told."""
    scores = torch.tensor([0, 5, 6, 5, 0, -1, -1, 0, 4, 3, 0, -2]) / 3
    (first,) = SnippetSearch().summary(scores, top=3)
    assert first.places == (1, 2, 3)
    assert first.coverage == pytest.approx(16 / 23) and first.score == pytest.approx(16 / 18)
    words = ["it", "is", "not", "bad", ",", "the", "film", ";", "good", "fun", ",", "really"]
    text = saliency_words(words, scores, top=3)
    assert text == "The phrase » is not bad « is most important for the prediction."
    # Runs that cover the same are all told.
    twins = torch.tensor([0, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2.0])
    words[7] = "."
    text = saliency_words(words, twins, search=SnippetSearch("quantile", 2.0, length=7))
    assert text == (
        "The word » is « is most important for the prediction. "
        "The word » . « and the word » really « are also salient."
    )
    apart = torch.zeros(33)
    apart[[2, 9, 16, 23, 30]] = torch.tensor([3.0, 4, 1, 5, 2])
    text = saliency_words(WORDS + WORDS[:13], apart, search=SnippetSearch("mean", 0.01))
    assert text == ("The word » w3 « is most important for the prediction. The word » w9 « is also salient.")
    middle = torch.tensor([0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0.0])
    assert saliency_words(words, middle) == (
        "The span » bad , the film . « is most important for the prediction."
    )


def test_nothing_stands_out():
    search = SnippetSearch()
    for scores in (torch.zeros(9), -torch.arange(9.0), torch.zeros(0), torch.full((9,), -1e-40)):
        words = [str(i) for i in range(len(scores))]
        assert saliency_words(words, scores) == "" and not search.summary(scores)
    assert not search.convolution(torch.ones(4)) and not search.spans(torch.ones(4))
    assert saliency_words(["good", "."], torch.tensor([1.0, -3])) == (
        "The word » good « is most important for the prediction."
    )
    even = torch.ones(40)
    assert saliency_words(["x"] * 40, even, search=SnippetSearch("mean", 1.0), min_coverage=0.2) == ""


def test_prompt_has_scores_in_per_cent():
    prompt = saliency_prompt(["not", "bad", "."], torch.tensor([0.2, 0.8, -0.1]), label="positive")
    assert "predicted: positive\n" in prompt and "not\t25\nbad\t100\n.\t-12\n" in prompt
    assert "a\t0\n" in saliency_prompt(["a"], torch.zeros(1), label="x")


def test_the_report_tells_what_leads_to_the_text():
    """Where the number falls from nothing to the text, what lowers it is told; pieces of words are joined."""
    model, inputs = made("bert")
    ids, labels = inputs["input_ids"][:1], ["[CLS]", "they", "were", ",", "play", "##ing", "cards", "."]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sample = Sample("title", inputs, labels, torch.arange(8) == 0, ids[0])
    (each,) = explain(Subject(model, "m", [sample]), []).samples
    (found,) = (a for a in each.attributions if a.method == "integrated gradients")
    assert (saliency_words(labels, found.scores) or "no part").replace(" ##", "") in _in_words(each)
    lowering = Attribution(found.method, labels, -torch.tensor([0, 0.1, 0, 0, 3, 2, 0, 0.1]))
    down = replace(each, attributions=[lowering], value=-1.0, nothing=2.0)
    assert "The phrase » playing « is most important for the prediction." in _in_words(down)
    assert "no part stands out" in _in_words(replace(down, value=3.0))


@pytest.mark.door
def test_doors():
    with pytest.raises(ValueError, match="metric is 'median', must be one of"):
        SnippetSearch("median")
    with pytest.raises(ValueError, match="sign is '0', must be one of"):
        SnippetSearch(sign="0")
    with pytest.raises(ValueError, match="length is 9, must be 4 to 8"):
        SnippetSearch(length=9).convolution(torch.ones(20))
    with pytest.raises(ValueError, match="length is 6, must be odd"):
        SnippetSearch(length=6).spans(torch.ones(20))
    with pytest.raises(ValueError, match=r"scores have shape \(2, 3\), must be one row"):
        SnippetSearch().spans(torch.ones(2, 3))
    with pytest.raises(ValueError, match="finite numbers"):
        SnippetSearch().tokens(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match=r"scores have shape \(3,\), must be \(2,\)"):
        saliency_words(["a", "b"], torch.ones(3))
    with pytest.raises(ValueError, match="top is 0"):
        saliency_words(["a"], torch.ones(1), top=0)
