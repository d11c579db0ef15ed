"""Recycled attention against lists and loops, step by step."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.cache import RecycledCache
from heedful.cache.recycled import RecycledLayer
from heedful.hf import attention_forward
from tests.cache_families import made, stepwise, tokens


class Transcription:
    """One batch row, two query heads a KV head, in Python lists."""

    def __init__(self, budget, stride, similarity, check, reduce):
        self.budget, self.stride, self.similarity, self.check = budget, stride, similarity, check
        self.reduce = max if reduce == "max" else lambda x: sum(x) / len(x)
        self.keys, self.values, self.near, self.step, self.fulls = [], [], None, 0, []

    def attend(self, query, places):
        """Output of a query head over these places, and its weights."""
        d = len(query)
        logits = [float(query @ self.keys[j][self.head]) / math.sqrt(d) for j in places]
        weights = [math.exp(x) for x in logits]
        weights = [w / sum(weights) for w in weights]
        return sum(w * self.values[j][self.head] for w, j in zip(weights, places, strict=True)), weights

    def prompt(self, query, key, value):
        self.keys, self.values = list(key.transpose(0, 1)), list(value.transpose(0, 1))
        self.near = [[], []]
        self.full(query[:, -1])

    def full(self, query):
        self.last = query
        everything = [list(range(len(self.keys)))] * 2
        return self.over(query, everything)

    def over(self, query, places):
        outputs = []
        for h in range(2):
            self.head = h
            pairs = [self.attend(query[2 * h + g], places[h]) for g in range(2)]
            outputs += [out for out, _ in pairs]
            score = {j: self.reduce([w[i] for _, w in pairs]) for i, j in enumerate(places[h])}
            self.near[h] = sorted(sorted(score, key=lambda j: -score[j])[: self.budget])
        return torch.stack(outputs)

    def decode(self, query, key, value):
        self.keys.append(key[:, 0])
        self.values.append(value[:, 0])
        self.step += 1
        query = query[:, 0]
        if self.similarity is None:
            full = self.step % self.stride == 0
        else:
            full = False
            if self.step % self.check == 0:
                cosine = [float(a @ b / a.norm() / b.norm()) for a, b in zip(query, self.last, strict=True)]
                full = sum(cosine) / len(cosine) < self.similarity
        self.fulls.append(full)
        if full:
            return self.full(query)
        return self.over(query, [[*near, len(self.keys) - 1] for near in self.near])


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 4},
        {"stride": 1},
        {"stride": 4, "reduce": "mean"},
        {"similarity": 0.1, "check": 2},
        {"similarity": -1.1, "check": 2},
        {"similarity": 1.1, "check": 3},
    ],
)
def test_steps_equal_transcription(options):
    told = {"stride": 50, "similarity": None, "check": 5, "reduce": "max"} | options
    generator = torch.Generator().manual_seed(1)
    period = told["stride"] if told["similarity"] is None else told["check"]
    layer = RecycledLayer(5, period, told["similarity"], told["reduce"])
    rows = [Transcription(5, **told) for _ in range(2)]
    module = torch.nn.Identity()
    for step in range(16):
        n = 11 if step == 0 else 1
        query = torch.randn(2, 4, n, 6, generator=generator, dtype=torch.float64)
        key, value = (torch.randn(2, 2, n, 6, generator=generator, dtype=torch.float64) for _ in range(2))
        got, _ = attention_forward(module, query, *layer.update(key, value), None)
        for b, row in enumerate(rows):
            if step == 0:
                row.prompt(query[b], key[b], value[b])
            else:
                torch.testing.assert_close(got[b, 0], row.decode(query[b], key[b], value[b]))
            assert [sorted(x) for x in layer.places[b].tolist()] == row.near
            assert layer.near_keys.shape[2] <= 5
    if told["similarity"] == 0.1:
        assert rows[0].fulls != rows[1].fulls and any(rows[0].fulls)  # rows decide by themselves
    if told["similarity"] == 1.1:
        assert rows[0].fulls == [i % 3 == 2 for i in range(15)]
    if told["similarity"] == -1.1:
        assert not any(rows[0].fulls)


def test_every_step_full_is_the_full_cache():
    model, ids = made(), tokens(1, 24)
    how = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids, **how)
    assert torch.equal(
        model.generate(ids, past_key_values=RecycledCache(model, tokens=3, stride=1), **how), wanted
    )


def test_layers_take_full_steps_together_or_each_by_itself():
    model, ids = made(num_hidden_layers=3), tokens(1, 40)
    fixed = RecycledCache(model, tokens=4, stride=7)
    stepwise(model, ids, fixed, 12)  # 28 steps
    assert [layer.held() for layer in fixed.layers] == [40] * 3
    assert [layer.keys.shape[2] for layer in fixed.layers] == [40] * 3
    assert [layer.near_keys.shape[2] for layer in fixed.layers] == [4] * 3
    dynamic = RecycledCache(model, tokens=4, check=5, similarity=0.8)
    stepwise(model, ids, dynamic, 12)
    assert [layer.keys.shape[2] for layer in dynamic.layers] == [37] * 3  # read whole at steps 5, ..., 25
    assert [layer.held() for layer in dynamic.layers] == [40] * 3


@pytest.mark.door
def test_errors_say_what_to_do():
    model = made()
    for name in ("tokens", "stride", "check"):
        with pytest.raises(ValueError, match=f"{name} is 0, must be"):
            RecycledCache(model, **{name: 0})
    with pytest.raises(ValueError, match="reduce is 'sum', must be one of"):
        RecycledCache(model, reduce="sum")
