from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from heedful import create
from heedful.mixers.linear.aaren import Aaren, AarenLayer


def build(**arguments) -> Aaren:
    torch.manual_seed(0)
    return create("aaren", 12, heads=3, dtype=torch.float64, **arguments)


def tokens(n: int = 9) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def literal(x: Tensor, mixer: Aaren, mask: Tensor) -> Tensor:
    """One softmax a prefix, row by row and head by head."""
    q = mixer.token @ mixer.query.weight.T + mixer.query.bias
    rows = []
    for b in range(len(x)):
        k = x[b] @ mixer.key.weight.T + mixer.key.bias
        v = x[b] @ mixer.value.weight.T + mixer.value.bias
        for i in range(x.shape[1]):
            seen = [j for j in range(i + 1) if mask[b, j]]
            heads = []
            for own in (slice(0, 4), slice(4, 8), slice(8, 12)):
                weight = torch.exp(k[seen][:, own] @ q[own] / 2)
                mean = (weight[:, None] * v[seen][:, own]).sum(0) / weight.sum()
                heads.append(mean if seen else torch.zeros(4, dtype=torch.float64))
            rows.append(torch.cat(heads) @ mixer.out.weight.T + mixer.out.bias)
    return torch.stack(rows).unflatten(0, x.shape[:2])


def test_equals_a_softmax_of_every_prefix():
    mixer, x = build(), tokens().requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.bool)
    assert_close(mixer(x), literal(x, mixer, mask))
    mask[0, 6:] = False
    mask[1, :2] = False
    y, expected = mixer(x, mask=mask), literal(x, mixer, mask)
    assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, *mixer.parameters()]
    assert_close(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )


def test_token_by_token_in_constant_memory():
    mixer, x = build(), tokens(70)
    state, parts = mixer.init_state(2), []
    size = state.nbytes()
    for t in range(70):
        y, state = mixer(x[:, t : t + 1], state=state)
        parts.append(y)
    assert_close(torch.cat(parts, dim=1), mixer(x))
    assert state.length == 70
    assert state.nbytes() == size == 2 * (12 + 2 * 3) * 8


@pytest.mark.parametrize("norm_first", [False, True])
def test_layer_is_an_encoder_layer_with_aaren(norm_first):
    torch.manual_seed(0)
    layer = AarenLayer(12, heads=3, feed_forward=20, norm_first=norm_first, dtype=torch.float64).eval()
    theirs = nn.TransformerEncoderLayer(12, 3, 20, norm_first=norm_first, batch_first=True).double().eval()
    with torch.no_grad():
        for own, other in (
            (layer.norm1, theirs.norm1),
            (layer.norm2, theirs.norm2),
            (layer.wide, theirs.linear1),
            (layer.narrow, theirs.linear2),
        ):
            for p, q in zip(own.parameters(), other.parameters(), strict=True):
                p.copy_(q.normal_())
    x = tokens()
    theirs._sa_block = lambda x, *rest, **more: layer.mixer(x)
    expected = theirs(x.requires_grad_())  # with a gradient torch takes no fused path
    assert_close(layer(x), expected)
    y, state = layer(x[:, :4], state=layer.init_state(2))
    rest, state = layer(x[:, 4:], state=state)
    assert_close(torch.cat([y, rest], dim=1), expected)
    assert state.length == 9


def test_dropout_of_the_layer_acts_in_training_alone():
    layer = AarenLayer(12, heads=3, dropout=0.5, dtype=torch.float64)
    x = tokens()
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_parameters():
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(nn.TransformerEncoderLayer(512, 8, 2048, device="meta")) == 3_152_384
    assert count(AarenLayer(512, heads=8, feed_forward=2048, device="meta")) == 3_152_896
    assert count(create("aaren", 512, device="meta")) == 4 * (512**2 + 512) + 512


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 5, must divide dim"):
        create("aaren", 12, heads=5)
    with pytest.raises(ValueError, match="feed_forward is 0"):
        AarenLayer(12, heads=3, feed_forward=0)
    with pytest.raises(ValueError, match="context is given, must be None"):
        build()(tokens(), context=tokens())
