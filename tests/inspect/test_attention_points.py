"""VL-SAM: the regularised flow of attention, and the points that it prompts."""

from __future__ import annotations

import pytest
import torch

from heedful.inspect import (
    RegularizedAttentionFlow,
    attention_to_points,
    capture,
    regularized_attention_flow,
)
from heedful.inspect.attention_points import largest_component
from tests.inspect.test_measures import EXACT, causal
from tests.steer.models import IMAGE, llava, picture_prompt


def by_loops(layers):
    """The card's steps 1 to 4, one entry at a time; layers of (h, n, n)."""
    n = layers[0].shape[-1]
    below = None
    for s in layers:
        heads = s.shape[0]
        fused = [[0.0] * n for _ in range(n)]
        for h in range(heads):
            w = sum(max(s[h, i].tolist()) for i in range(n)) / n
            for i in range(n):
                for j in range(n):
                    fused[i][j] += w * s[h, i, j].item() / heads
        if below is None:
            table = fused
        else:
            table = [[0.0] * n for _ in range(n)]
            for i in range(n):
                for j in range(n):
                    table[i][j] = sum(((i == k) + fused[i][k]) * ((k == j) + below[k][j]) for k in range(n))
        below = [[table[i][j] * (1 - ((n - j) - 1) / n) for j in range(n)] for i in range(n)]
    return torch.tensor(below, dtype=torch.float64)


def test_flow_by_loops():
    layers = [causal(6, 3, seed) for seed in range(3)]
    found = regularized_attention_flow(s[None] for s in layers)
    torch.testing.assert_close(found[0], by_loops(layers), **EXACT)


def test_columns_of_a_single_layer():
    s = causal(5, 1)
    table = regularized_attention_flow([s[None]])[0]
    weight = s[0].amax(-1).mean()
    torch.testing.assert_close(table[:, 0], weight * s[0, :, 0] / 5, **EXACT)  # seen by all
    torch.testing.assert_close(table[:, 4], weight * s[0, :, 4], **EXACT)  # by itself alone


def test_without_collapse():
    """Behind a causal mask a plain product leaves everything to the first token; this one does not."""
    n = 40
    s = (torch.ones(n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1)[:, None])[None, None]
    plain = torch.eye(n, dtype=torch.float64)
    for _ in range(20):
        plain = (0.5 * s[0, 0] + 0.5 * torch.eye(n)) @ plain
    row = regularized_attention_flow([s] * 20)[0, -1]
    assert plain[-1].argmax() == 0 and plain[-1, 0] > 0.8
    assert row[:-1].argmax() != 0 and row[0] / row.sum() < 0.1


def test_padding_changes_nothing():
    s = causal(5, 2)
    wide = torch.zeros(1, 2, 7, 7, dtype=torch.float64)
    wide[0, :, 2:, 2:] = s
    seen = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    seen[..., :2] = False
    alone, padded = RegularizedAttentionFlow(), RegularizedAttentionFlow()
    for _ in range(2):
        alone.add(s[None])
        padded.add(wide, seen)
    torch.testing.assert_close(padded.table[:, 2:, 2:], alone.table, **EXACT)


def test_a_vision_language_model():
    model = llava()
    model.set_attn_implementation("sdpa")
    inputs = picture_prompt(2)
    flow, layers = RegularizedAttentionFlow(), []
    with torch.no_grad(), capture(model.model.language_model, flow):
        model(**inputs)
    model.set_attn_implementation("eager")
    one = {key: x[:1] for key, x in inputs.items()}
    with torch.no_grad():
        layers = model(**one, output_attentions=True).attentions
    assert len(layers) == 4 and flow.table.shape == (2, 16, 16)
    torch.testing.assert_close(flow.table[0].double(), by_loops([s[0] for s in layers]), rtol=1e-4, atol=1e-5)
    image = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    found = flow.map(15, image, (3, 3), (12, 24))
    assert found.shape == (2, 12, 24) and found.min() >= 0 and found.max() <= 1
    rows = flow.map(15, image, (3, 3), (3, 3))
    assert rows.amin((1, 2)).tolist() == [0, 0] and rows.amax((1, 2)).tolist() == [1, 1]
    assert rows[0].argmax() == flow.table[0, 15, 3:12].argmax()
    points = attention_to_points(found[0])
    x, y = points.positive
    assert points.area[y, x] and found[0, y, x] == found[0].max()
    x, y = points.negative
    assert not points.area[y, x] and found[0, y, x] == found[0].min()
    with torch.no_grad():
        cache = model(**one).past_key_values
    step = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
    with (
        torch.no_grad(),
        capture(model.model.language_model, RegularizedAttentionFlow()),
        pytest.raises(ValueError, match="1 queries for 17 keys; run all at once"),
    ):
        model(**step)


def test_points():
    attention = torch.tensor(
        [
            [0.9, 0.1, 0.0, 0.3],
            [0.1, 0.2, 0.6, 0.1],
            [0.1, 0.7, 0.8, 0.1],
            [-0.2, 0.1, 0.1, 0.1],
        ]
    )
    points = attention_to_points(attention)  # above 0.45: the corner alone, and three that touch
    assert points.area.nonzero().tolist() == [[1, 2], [2, 1], [2, 2]]
    assert points.positive == (2, 2) and points.negative == (0, 3)
    assert attention_to_points(attention, threshold=0.85).positive == (0, 0)  # of equal pieces the first
    masked = attention * ~points.area  # a second pair, without what was found
    assert attention_to_points(masked).positive == (0, 0)


def test_pieces_that_wind():
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[::2] = True
    mask[1, 8] = mask[3, 0] = mask[5, 8] = mask[7, 0] = True  # one long snake
    assert torch.equal(largest_component(mask), mask)
    mask[1, 8] = False
    assert torch.equal(largest_component(mask).any(1), torch.tensor([False, False] + [True] * 7))
    assert not largest_component(torch.zeros(3, 3, dtype=torch.bool)).any()


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="layers is empty"):
        regularized_attention_flow([])
    with pytest.raises(ValueError, match="no layer was added"):
        RegularizedAttentionFlow().map(0, slice(0, 4), (2, 2), (2, 2))
    with pytest.raises(ValueError, match="weights are of 4 tokens, must be of 3"):
        regularized_attention_flow([torch.ones(1, 1, 3, 3), torch.ones(1, 1, 4, 4)])
    for wrong in (torch.zeros(2, 2), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match="attention has no positive maximum"):
            attention_to_points(wrong)
    with pytest.raises(ValueError, match="exceeds the threshold everywhere"):
        attention_to_points(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"threshold is 1.0, must lie in \[0, 1\)"):
        attention_to_points(torch.eye(2), threshold=1.0)
