from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from heedful import create
from heedful.mixers.linear import titans_pytorch
from heedful.mixers.linear.titans_pytorch import TitansPytorchMemory

FORMS = [
    {"chunk_size": 1},
    {"heads": 3, "head_dim": 4, "chunk_size": 3},
    {"heads": 2, "head_dim": 5, "chunk_size": 2, "batch_size": 4, "max_lr": 0.1, "depth": 3},
    {"chunk_size": 3, "batch_size": 3, "depth": 1},
]


def build(**arguments) -> TitansPytorchMemory:
    torch.manual_seed(0)
    mixer = create("titans-pytorch-memory", 8, expansion=1.5, dtype=torch.float64, **arguments)
    with torch.no_grad():
        for p in (mixer.gamma, mixer.store_norm.weight, mixer.retrieve_norm.weight):
            p.normal_()
    return mixer


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps) * weight


def network(z: Tensor, weights: list[Tensor]) -> Tensor:
    gamma, *layers = weights
    y = z @ layers[0]
    for w in layers[1:]:
        y = F.gelu(y) @ w
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-5)
    return y * (gamma + 1) + z


def literal(x: Tensor, mixer: TitansPytorchMemory, seen: Tensor) -> Tensor:
    """One sequence: chunk after chunk with autograd for the inner gradient, then every token's read."""
    c, d, n = mixer.chunk_size, mixer.widths[0], len(x)
    s, r = norm(x, mixer.store_norm.weight), norm(x, mixer.retrieve_norm.weight)
    columns = []
    for h in range(mixer.heads):
        own = slice(h * d, (h + 1) * d)

        def rate(linear, z, h=h) -> Tensor:
            return torch.sigmoid(z @ linear.weight[h] + linear.bias[h])

        W = [mixer.gamma[h], *(w[h] for w in mixer.memory)]
        S, history, reference = [torch.zeros_like(w) for w in W], [W], W
        for start in range(0, n - n % c, c):
            if mixer.batch_size is not None and start % mixer.batch_size == 0:
                reference = W
            tokens, on = s[start : start + c], seen[start : start + c].double()
            k, v = tokens @ mixer.key.weight[own].T, tokens @ mixer.value.weight[own].T
            lr = mixer.max_lr * rate(mixer.step, tokens) * on
            loss = (lr * (network(k, reference) - v).square().mean(-1)).sum()
            gradient = torch.autograd.grad(loss, reference, create_graph=True)
            mean = (tokens * on[:, None]).sum(0) / on.sum().clamp(min=1)
            eta, alpha = rate(mixer.momentum, mean), rate(mixer.forget, mean)
            S = [eta * a - g for a, g in zip(S, gradient, strict=True)]
            W = [(1 - alpha) * w + a for w, a in zip(W, S, strict=True)]
            history.append(W)
        q = r @ mixer.query.weight[own].T
        y = torch.stack([network(q[t], history[(t + 1) // c]) for t in range(n)])
        if mixer.gate is not None:
            y = y * torch.sigmoid(r @ mixer.gate.weight[h])[:, None]
        columns.append(y)
    y = torch.cat(columns, dim=-1)
    return y if mixer.out is None else y @ mixer.out.weight.T


@pytest.mark.parametrize("arguments", FORMS)
def test_equals_gradient_descent_by_autograd(arguments):
    mixer = build(**arguments)
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :2] = False
    mask[1, 4:9] = False
    for seen in (torch.ones_like(mask), mask):
        expected = torch.stack([literal(row, mixer, on) for row, on in zip(x, seen, strict=True)])
        with patch.object(titans_pytorch, "CHUNKS", 2):
            y = mixer(x, mask=seen)
        assert_close(y[seen], expected[seen])
        weight = torch.randn_like(y) * seen[..., None]
        leaves = [x, *mixer.parameters()]
        grads = (torch.autograd.grad((z * weight).sum(), leaves) for z in (y, expected))
        assert_close(*grads)


@pytest.mark.parametrize("arguments", FORMS)
def test_any_cut_changes_nothing(arguments):
    mixer, x = build(**arguments), torch.randn(2, 29, 8, dtype=torch.float64)
    whole = mixer(x)
    for cuts in ((1, 2, 5, 29), (4, 8, 16, 29), tuple(range(1, 30))):
        state, start, parts = mixer.init_state(2), 0, []
        for stop in cuts:
            y, state = mixer(x[:, start:stop], state=state)
            parts.append(y)
            start = stop
        assert_close(torch.cat(parts, dim=1), whole)
        assert state.pending.shape[1] == 29 % mixer.chunk_size


def test_parameters():
    mixer = create("titans-pytorch-memory", 16, heads=2, head_dim=6, expansion=2.0, device="meta")
    count = sum(p.numel() for p in mixer.parameters())
    assert count == 2 * 16 + 4 * 12 * 16 + 3 * (2 * 16 + 2) + 2 * 16 + 2 * (6 + 2 * 6 * 12)


@pytest.mark.door
def test_constructor_errors():
    for arguments, message in (
        ({"heads": 0}, "heads is 0"),
        ({"head_dim": 4}, r"head_dim is 4, must be 8 \(dim\) with one head"),
        ({"chunk_size": 4, "batch_size": 6}, "batch_size is 6, must be a multiple of chunk_size, 4"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**arguments)
