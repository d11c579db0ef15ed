from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from heedful import create
from heedful.mixers.linear.lightning_attention_2 import LightningAttention2


def build(**kwargs) -> LightningAttention2:
    torch.manual_seed(0)
    return create("lightning-attention-2", 12, dtype=torch.float64, **kwargs)


def tokens(n: int = 9) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def literal(x: Tensor, mixer: LightningAttention2, rates: list[float], mask: Tensor | None = None) -> Tensor:
    """The quadratic form, head by head and token by token."""
    b, n, c = x.shape
    w = mixer.qkvu_proj.weight
    q, k, v, u = (x @ w[i * c : (i + 1) * c].T for i in range(4))
    q, k = q / (1 + torch.exp(-q)), k / (1 + torch.exp(-k))
    if mask is not None:
        v = v * mask[..., None]
    d = c // len(rates)
    o = torch.zeros(b, n, c, dtype=torch.float64)
    for h, rate in enumerate(rates):
        part = slice(h * d, (h + 1) * d)
        for t in range(n):
            for j in range(t + 1):
                weight = torch.exp(torch.tensor(-rate * (t - j), dtype=torch.float64))
                score = (q[:, t, part] * k[:, j, part]).sum(-1, keepdim=True)
                o = o.index_put(
                    (torch.arange(b)[:, None], torch.tensor(t), torch.arange(h * d, h * d + d)),
                    weight * score * v[:, j, part],
                    accumulate=True,
                )
    o = o / torch.sqrt(o.pow(2).mean(-1, keepdim=True) + mixer.eps)
    return (u * o) @ mixer.out_proj.weight.T


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        ({"heads": 4}, [s * (1 + 1e-5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256)]),
        (
            {"heads": 6, "layer_index": 1, "layers": 5},
            [s * (3 / 4 + 1e-5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8)],
        ),
        ({"heads": 2, "layer_index": 4, "layers": 5}, [1e-5 / 16, 1e-5 / 256]),
        ({"heads": 4, "eps": 0.5}, [s * (1 + 1e-5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256)]),
    ],
)
def test_equals_the_quadratic_form(arguments, rates):
    mixer, x = build(**arguments), tokens()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    mask[1, 2:4] = False
    assert_close(mixer(x), literal(x, mixer, rates))
    y, expected = mixer(x, mask=mask), literal(x, mixer, rates, mask)
    assert_close(y, expected)
    parameters = list(mixer.parameters())
    assert_close(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
    )


def test_slopes_of_eight_heads():
    mixer = create("lightning-attention-2", 16, layer_index=0, layers=24)
    assert_close(mixer.log_decay, [-(2.0**-i) * (1 + 1e-5) for i in range(1, 9)])
    last = create("lightning-attention-2", 16, layer_index=23, layers=24)
    assert_close(last.log_decay, [-(2.0**-i) * 1e-5 for i in range(1, 9)])


def test_parameters():
    mixer = create("lightning-attention-2", 1024, device="meta")
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {"qkvu_proj.weight": (4096, 1024), "out_proj.weight": (1024, 1024)}
    # 24 layers of this mixer and of a gated feed-forward of width 2816 are the 333,447,168 of the release.
    assert 24 * (sum(p.numel() for p in mixer.parameters()) + 3 * 1024 * 2816) == 333_447_168


def test_decoding_equals_the_full_pass():
    mixer, x = build(heads=4, layer_index=1, layers=3), tokens(70)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, :5] = False
    whole = mixer(x, mask=mask)
    y, state = mixer(x[:, :33], mask=mask[:, :33], state=mixer.init_state(2))
    parts = [y]
    for t in range(33, 70):
        y, state = mixer(x[:, t : t + 1], state=state)
        parts.append(y)
    assert_close(torch.cat(parts, dim=1), whole)
    assert state.length == 70
    assert state.matrix.shape == (2, 4, 3, 3)
    assert state.nbytes() == mixer.init_state(2).nbytes()


def test_bfloat16_keeps_state_and_decays_exact():
    mixer = build(heads=6).bfloat16()
    y, state = mixer(tokens().bfloat16(), state=mixer.init_state(2))
    assert y.dtype == torch.bfloat16
    assert state.matrix.dtype == torch.float32
    assert mixer.log_decay == build(heads=6).log_decay


@pytest.mark.door
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "heads is 5, must divide dim"),
        ({"layers": 0}, "layers is 0"),
        ({"layer_index": 3, "layers": 3}, r"layer_index is 3, must be from 0 to 2"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**{"heads": 4, **arguments})


@pytest.mark.door
def test_no_cross_attention():
    with pytest.raises(ValueError, match="context is given, must be None"):
        build(heads=4)(tokens(), context=tokens())
