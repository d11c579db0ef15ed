"""The lane of a task: a transcription, tasks apart, what gradients reach, counts, errors."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.cross.multi_lane import SummarizedPathwayAttention


def build(**how):
    torch.manual_seed(0)
    mixer = SummarizedPathwayAttention(12, **{"heads": 3, "prompts": 2, "tasks": 3, **how}).double()
    for p in mixer.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return mixer


def transcribed(mixer, x, z, task):
    """One lane x (1 + s, c) over tokens z (n, c)."""
    z = z.detach()
    summaries = []
    for selector in x[1:]:
        weights = torch.stack([(selector @ token / 12**0.5).exp() for token in z])
        summaries.append((weights[:, None] * z).sum(0) / weights.sum())
    own = torch.stack([x[0], *summaries]) if len(x) > 1 else x[:1]
    q, k, v = (own @ mixer.qkv.weight.T + mixer.qkv.bias).split(12, -1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        keys, values = k[:, part], v[:, part]
        if mixer.prompts is not None:
            keys = torch.cat([mixer.prompts[0, task, :, h], keys])
            values = torch.cat([mixer.prompts[1, task, :, h], values])
        weights = (keys @ q[0, part] / 2).exp()
        heads.append((weights[:, None] * values).sum(0) / weights.sum())
    y = mixer.proj.weight @ torch.cat(heads) + mixer.proj.bias
    return torch.cat([y[None], x[1:]])


@pytest.mark.parametrize("prompts", [2, 0])
def test_equals_transcription(prompts):
    mixer = build(prompts=prompts)
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    y = mixer(x, context=z, task=1)
    expected = torch.stack([transcribed(mixer, x[b], z[b], 1) for b in range(2)])
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    ours, theirs = (torch.autograd.grad((t * weight).sum(), leaves) for t in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_lanes_are_apart():
    mixer = build()
    x, z = torch.randn(2, 2, 4, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    y = mixer.lanes(x, z, first=1)
    for t in range(2):
        torch.testing.assert_close(y[t], mixer(x[t], context=z, task=t + 1))
    assert (mixer(x[0], context=z, task=0) - y[0]).abs().max() > 1e-3


def test_a_selector_of_zeros_gives_the_mean():
    mixer = build(prompts=0)
    x, z = torch.randn(1, 2, 12, dtype=torch.float64), torch.randn(1, 5, 12, dtype=torch.float64)
    x[:, 1] = 0
    y = mixer(x, context=z)
    mean = z.mean(1, keepdim=True)
    torch.testing.assert_close(y[:, :1], mixer.stream(torch.cat([x[:, :1], mean], 1))[:, :1])


def test_no_gradient_reaches_the_context():
    mixer = build()
    x, z = torch.randn(1, 3, 12, dtype=torch.float64), torch.randn(1, 5, 12, dtype=torch.float64)
    z.requires_grad_()
    y = mixer(x.requires_grad_(), context=z)
    assert torch.autograd.grad(y.sum(), z, allow_unused=True) == (None,)


def test_parameters():
    mixer = SummarizedPathwayAttention(768, prompts=20, tasks=10, device="meta", heads=12)
    count = sum(p.numel() for p in mixer.parameters())
    assert count == 2 * 10 * 20 * 768 + 4 * 768 * 768 + 4 * 768
    rows = build(tasks=1, prompts=2)
    fresh = SummarizedPathwayAttention(12, heads=3, prompts=2).prompts[0, 0].flatten(1)
    torch.testing.assert_close(fresh @ fresh.T, torch.eye(2), rtol=1e-5, atol=1e-6)
    assert rows.prompts.shape == (2, 1, 2, 3, 4)


@pytest.mark.door
def test_errors():
    mixer = build()
    x = torch.zeros(2, 3, 12, dtype=torch.float64)
    for call, message in (
        (lambda: mixer(x, context=x, task=3), "task is 3, must be 0 to 2"),
        (lambda: mixer(x, context=x[:1]), "context has batch 1, must be 2"),
        (lambda: build(prompts=-1), "prompts is -1"),
        (lambda: build(heads=5), "heads is 5, must divide dim"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
