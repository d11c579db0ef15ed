from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.mixers.grid.davit import ChannelGroupAttention, DaViTWindowAttention


def channel_transcription(m: ChannelGroupAttention, x: Tensor) -> Tensor:
    """The numbered steps, one image, one group and one row of A at a time."""
    dim, d = m.dim, m.dim // m.heads
    images = []
    for tokens in x.flatten(2).mT:
        qkv = tokens @ m.qkv.weight.T
        if m.qkv.bias is not None:
            qkv = qkv + m.qkv.bias
        q, k, v = (qkv[:, i * dim : (i + 1) * dim] for i in range(3))
        under = d if m.scale_mode == "head" else len(tokens)
        columns = []
        for c in range(dim):
            group = slice(c // d * d, (c // d + 1) * d)
            row = (k[:, c] @ v[:, group] / under**0.5).exp()
            columns.append(q[:, group] @ (row / row.sum()))
        images.append(torch.stack(columns, 1) @ m.proj.weight.T + m.proj.bias)
    return torch.stack(images).mT.reshape(x.shape)


def window_transcription(m: DaViTWindowAttention, x: Tensor) -> Tensor:
    """Each token of the padded map attends to those with the same window, by a loop."""
    batch, dim, height, width = x.shape
    d, w = dim // m.heads, m.window
    padded = F.pad(x, (0, -width % w, 0, -height % w)).movedim(1, -1)
    qkv = padded @ m.qkv.weight.T
    if m.qkv.bias is not None:
        qkv = qkv + m.qkv.bias
    y = []
    for b in range(batch):
        for r in range(height):
            for c in range(width):
                top, left = r // w * w, c // w * w
                seen = qkv[b, top : top + w, left : left + w].reshape(w * w, 3, m.heads, d)
                parts = []
                for h in range(m.heads):
                    q = qkv[b, r, c, h * d : (h + 1) * d]
                    weight = (seen[:, 1, h] @ q / d**0.5).exp()
                    parts.append((weight / weight.sum()) @ seen[:, 2, h])
                y.append(torch.cat(parts) @ m.proj.weight.T + m.proj.bias)
    return torch.stack(y).reshape(batch, height, width, dim).movedim(-1, 1)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"heads": 2}, (3, 4)),
        ({"heads": 4, "qkv_bias": False}, (7,)),
        ({"heads": 1, "scale_mode": "tokens"}, (2, 3, 2)),
        ({"heads": 8}, (1, 1)),
    ],
)
def test_channel_equals_transcription_with_gradients(options, size):
    torch.manual_seed(0)
    m = ChannelGroupAttention(8, **options, dtype=torch.float64)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    ours, literal = m(x), channel_transcription(m, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"heads": 2, "window": 3}, (5, 7)),
        ({"heads": 4, "window": 2, "qkv_bias": False}, (4, 6)),
        ({"heads": 1}, (2, 3)),
    ],
)
def test_window_equals_transcription_with_gradients(options, size):
    torch.manual_seed(0)
    m = DaViTWindowAttention(8, **options, dtype=torch.float64)
    with torch.no_grad():
        m.qkv.weight.mul_(3)  # far from uniform weights
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    ours, literal = m(x), window_transcription(m, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up))


@pytest.mark.parametrize(
    "m",
    [
        ChannelGroupAttention(4, heads=2, dtype=torch.float64),
        DaViTWindowAttention(4, heads=2, window=2, dtype=torch.float64),
    ],
)
def test_gradcheck(m):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, (x,))


def test_channel_attention_permutes_with_the_tokens():
    torch.manual_seed(0)
    m = ChannelGroupAttention(16, heads=4, dtype=torch.float64)
    x = torch.randn(2, 16, 11, dtype=torch.float64)
    order = torch.randperm(11)
    torch.testing.assert_close(m(x[..., order]), m(x)[..., order])


def test_channel_attention_is_one_map_of_weights_for_all_tokens():
    torch.manual_seed(0)
    m = ChannelGroupAttention(8, heads=2, dtype=torch.float64)
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    weights = m.attend(torch.eye(4, dtype=torch.float64).repeat(2, 2, 2, 1)[:, :, :5], k, v, (5,))[..., :4, :]
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 2, 4, dtype=torch.float64))
    torch.testing.assert_close(m.attend(q, k, v, (5,)), q @ weights)


def test_windows_do_not_see_each_other():
    torch.manual_seed(0)
    m = DaViTWindowAttention(8, heads=2, window=3, dtype=torch.float64)
    x = torch.randn(1, 8, 7, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(m(x)[0, :, 4, 7].sum(), x)
    seen = torch.zeros(7, 8, dtype=torch.bool)
    seen[3:6, 6:8] = True
    assert torch.equal(gradient[0].abs().sum(0) > 0, seen)


@pytest.mark.parametrize("kind", [ChannelGroupAttention, DaViTWindowAttention])
@pytest.mark.parametrize(("qkv_bias", "count"), [(True, 4 * 64**2 + 4 * 64), (False, 4 * 64**2 + 64)])
def test_parameter_count(kind, qkv_bias, count):
    assert sum(p.numel() for p in kind(64, heads=4, qkv_bias=qkv_bias).parameters()) == count


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 3, must divide dim"):
        ChannelGroupAttention(8, heads=3)
    with pytest.raises(ValueError, match="scale_mode is 'dim', must be one of 'head', 'tokens'"):
        ChannelGroupAttention(8, scale_mode="dim")
    with pytest.raises(ValueError, match="window is 0, must be a whole number"):
        DaViTWindowAttention(8, window=0)
