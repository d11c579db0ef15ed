from __future__ import annotations

import pytest
import torch

import heedful
from heedful.mixers.channel.eca import ECA, ECANS, adaptive_kernel


def transcription(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The card's steps with loops; weight (C, k), one row a channel."""
    channels, k = weight.shape
    z = x.flatten(2).mean(-1)
    gates = []
    for c in range(channels):
        s = torch.zeros(len(x), dtype=x.dtype)
        for j in range(k):
            at = c + j - (k - 1) // 2
            if 0 <= at < channels:
                s = s + weight[c, j] * z[:, at]
        gates.append(1 / (1 + torch.exp(-s)))
    return torch.stack([x[:, c] * g.view(-1, *[1] * (x.ndim - 2)) for c, g in enumerate(gates)], 1)


@pytest.mark.parametrize("space", [(5,), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("name", ["eca", "eca-ns"])
def test_equals_transcription_with_gradients(name: str, space: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mixer = heedful.create(name, 6, kernel=5, dtype=torch.float64)
    x = torch.randn(2, 6, *space, dtype=torch.float64, requires_grad=True)
    weight = mixer.conv.weight
    literal = transcription(x, weight[:, 0].expand(6, 5))
    torch.testing.assert_close(mixer(x), literal)
    up = torch.randn_like(x)
    for ours, theirs in zip(
        torch.autograd.grad(mixer(x), (x, weight), up),
        torch.autograd.grad(literal, (x, weight), up),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_adaptive_kernel() -> None:
    known = {64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    assert {c: adaptive_kernel(c) for c in known} == known
    assert ECA(2048).kernel == 7
    assert adaptive_kernel(1) == 1


def test_parameter_counts() -> None:
    assert sum(p.numel() for p in ECA(64, kernel=5).parameters()) == 5
    assert sum(p.numel() for p in ECANS(64, kernel=5).parameters()) == 64 * 5
    # All gates of the authors' ResNet-50: 3, 4, 6, 3 blocks with k = 3, 5, 5, 7.
    gates = [
        ECA(256 * 2**i, kernel=k)
        for i, (n, k) in enumerate([(3, 3), (4, 5), (6, 5), (3, 7)])
        for _ in range(n)
    ]
    assert sum(p.numel() for g in gates for p in g.parameters()) == 80


def test_kernel_of_one_gates_each_channel_by_itself() -> None:
    mixer, x = ECA(5, kernel=1), torch.randn(2, 5, 3, 4)
    with torch.no_grad():
        mixer.conv.weight.fill_(1.7)
    torch.testing.assert_close(mixer(x), x * torch.sigmoid(1.7 * x.mean((2, 3), keepdim=True)))


def test_zero_weights_halve() -> None:
    mixer, x = ECA(5, kernel=3), torch.randn(2, 5, 3, 4)
    with torch.no_grad():
        mixer.conv.weight.zero_()
    torch.testing.assert_close(mixer(x), x / 2)


def test_permuting_space_permutes_the_result() -> None:
    mixer, x = ECA(7), torch.randn(2, 7, 12)
    order = torch.randperm(12)
    torch.testing.assert_close(mixer(x[..., order]), mixer(x)[..., order])


def test_unshared_with_equal_rows_is_shared() -> None:
    shared, unshared, x = ECA(6, kernel=3), ECANS(6, kernel=3), torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        unshared.conv.weight.copy_(shared.conv.weight.expand(6, 1, 3))
    torch.testing.assert_close(unshared(x), shared(x))


@pytest.mark.door
@pytest.mark.parametrize("kernel", [0, 2, -3])
def test_kernel_must_be_odd(kernel: int) -> None:
    with pytest.raises(ValueError, match="kernel is"):
        ECA(8, kernel=kernel)


@pytest.mark.door
def test_wrong_channels() -> None:
    with pytest.raises(ValueError, match="x has shape"):
        ECA(8)(torch.zeros(2, 7, 3))
