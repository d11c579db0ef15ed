"""Dense attention with a convolution of its input, against loops."""

from __future__ import annotations

import pytest
import torch

from heedful.mixers.grid.attention_lepe import AttentionLePE


def transcription(mixer: AttentionLePE, x: torch.Tensor) -> torch.Tensor:
    batch, dim, height, width = x.shape
    d, r = dim // mixer.heads, mixer.lepe.kernel_size[0] // 2
    places = [(i, j) for i in range(height) for j in range(width)]
    y = torch.zeros_like(x)
    for b in range(batch):
        q, k, v = ([w @ x[b, :, i, j] for i, j in places] for w in mixer.qkv.weight.chunk(3))
        for n, (i, j) in enumerate(places):
            parts = []
            for h in range(mixer.heads):
                own = slice(h * d, (h + 1) * d)
                weight = torch.stack([(q[n][own] @ k[m][own] / d**0.5).exp() for m in range(len(places))])
                parts.append(sum(w * v[m][own] for m, w in enumerate(weight)) / weight.sum())
            out = torch.cat(parts) + mixer.lepe.bias
            for s in range(-r, r + 1):
                for t in range(-r, r + 1):
                    if 0 <= i + s < height and 0 <= j + t < width:
                        out = out + mixer.lepe.weight[:, 0, s + r, t + r] * x[b, :, i + s, j + t]
            y[b, :, i, j] = mixer.proj.weight @ out + mixer.proj.bias
    return y


def test_equals_transcription():
    torch.manual_seed(0)
    mixer = AttentionLePE(6, heads=2, lepe_kernel=3, dtype=torch.float64)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    y, wanted = mixer(x), transcription(mixer, x)
    torch.testing.assert_close(y, wanted)
    leaves = [x, *mixer.parameters()]
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), leaves), torch.autograd.grad((wanted * weight).sum(), leaves)
    )


@pytest.mark.door
def test_refuses_an_even_kernel():
    with pytest.raises(ValueError, match="lepe_kernel is 4, must be odd"):
        AttentionLePE(8, heads=2, lepe_kernel=4)
