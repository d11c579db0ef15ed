"""Transcriptions that several tests of mixers share: loops in float64, nothing of heedful's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.testing import assert_close


def s6(u: Tensor, ssm: nn.Module, r: int) -> Tensor:
    """The selective state space with the weights of route r over tokens (n, d), one at a time."""
    R, S = ssm.rank, ssm.state_dim
    h, rows = torch.zeros(u.shape[1], S, dtype=torch.float64), []
    for u_t in u:
        given = ssm.read[r] @ u_t
        delta = torch.log1p(torch.exp(ssm.step[r] @ given[:R] + ssm.step_bias[r]))
        decay = torch.exp(-delta[:, None] * torch.exp(ssm.log_rate[r]))
        h = decay * h + torch.outer(delta * u_t, given[R : R + S])
        rows.append(h @ given[R + S :] + ssm.skip[r] * u_t)
    return torch.stack(rows)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A depthwise convolution of (c, height, width), padded by half its size, place by place."""
    size, stride = conv.kernel_size[0], conv.stride[0]
    _, height, width = x.shape
    rows = []
    for i in range(0, height, stride):
        row = []
        for j in range(0, width, stride):
            y = conv.bias
            for a in range(size):
                for b in range(size):
                    p, q = i + a - size // 2, j + b - size // 2
                    if 0 <= p < height and 0 <= q < width:
                        y = y + x[:, p, q] * conv.weight[:, 0, a, b]
            row.append(y)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, 1)


def scatter(module: nn.Module) -> None:
    """Move every parameter away from special values, and steps of state spaces to where they matter."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("step_bias"):
                parameter.add_(2)


def assert_same_with_gradients(y: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Equal to rounding, and so are the gradients of a random functional in all leaves."""
    assert_close(y, expected)
    weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_close(*(torch.autograd.grad((z * weight).sum(), leaves) for z in (y, expected)))
