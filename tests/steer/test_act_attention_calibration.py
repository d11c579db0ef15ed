"""Attention calibration: its formulas by loops, and its place in a model."""

from __future__ import annotations

import pytest
import torch

from heedful.hf import Handler, tap
from heedful.steer import AttentionCalibration
from heedful.steer.act_attention_calibration import calibrate, excessive, received
from tests.steer.contract import check_intervention
from tests.steer.models import llama, words


def causal_weights(n: int = 9, heads: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, heads, n, n, dtype=torch.float64, generator=generator)
    logits[:, :, :, [0, 4]] += 3  # what draws attention
    return logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def transcription(a, threshold, beta):
    """The numbered steps, for one head."""
    n = len(a)
    score = [sum(a[i][j] for i in range(n)) / (n - j) for j in range(n)]
    sinks = [j for j in range(n) if score[j] > threshold][1:]
    new = a.clone()
    for i in range(n):
        freed = (1 - beta) * sum(a[i][j] for j in sinks)
        rest = {j: a[i][j] for j in range(n) if j not in sinks}
        for j in sinks:
            new[i, j] = beta * a[i][j]
        for j, w in rest.items():
            new[i, j] = w + freed * w / sum(rest.values())
    new[0, 0] = 1.0
    return new, sinks


def test_calibration_equals_transcription():
    a = causal_weights()
    sinks = excessive(received(a), 0.2)
    found = calibrate(a, sinks, 0.4)
    changed = 0
    for b in range(2):
        for h in range(3):
            wanted, where = transcription(a[b, h], 0.2, 0.4)
            torch.testing.assert_close(found[b, h], wanted)
            assert sinks[b, h].nonzero()[:, 0].tolist() == where
            changed += bool(where)
    assert changed > 2
    torch.testing.assert_close(found.sum(-1), a.sum(-1))
    assert torch.equal(calibrate(a, sinks, 1.0), a)


def test_padding_does_not_count():
    a = causal_weights(7, 1)
    padded = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    padded[:, :, 2:, 2:] = a
    padded[:, :, :2] = 1 / 9  # whatever padding looks at
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :2] = False
    torch.testing.assert_close(received(padded, mask)[..., 2:], received(a))


def settings(beta: float, **how) -> AttentionCalibration:
    return AttentionCalibration(beta=beta, threshold=0.12, layers=[1, 2], **how)


def test_contract():
    check_intervention(lambda: settings(0.2), lambda: settings(1.0), llama(), words())


def test_only_the_chosen_heads_change_and_sinks_stay_damped_while_decoding():
    model, inputs = llama(), words()
    found = {"before": [], "after": []}

    class Look(Handler):
        def __init__(self, name):
            self.name = name

        def weights(self, site, weights):
            if site.layer == 1:
                found[self.name].append(weights)
            return weights

    steer = AttentionCalibration(beta=0.25, threshold=0.04, heads={1: [2]})
    with torch.no_grad(), tap(model, Look("before")), steer(model), tap(model, Look("after")):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for before, after in zip(found["before"], found["after"], strict=True):
        assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]])
        damped = torch.isclose(after[:, 2], 0.25 * before[:, 2], rtol=1e-4) & (before[:, 2] > 1e-6)
        assert damped.any()
        torch.testing.assert_close(before.sum(-1), after.sum(-1))
    assert len(found["before"]) == 3


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match=r"beta is -1, must lie in \[0, 1\]"):
        AttentionCalibration(beta=-1)
