"""heedful.nn.MultiheadAttention: equal to torch's module on the same weights, over its options."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import heedful
from heedful import patterns as p
from heedful.nn import MultiheadAttention

N, M, B, E, H = 5, 7, 3, 12, 4


def pair(**options):
    """Torch's module and ours, drawn from the same seed, in float64."""
    modules = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(3)
        modules.append(kind(E, H, dtype=torch.float64, **options))
    theirs, ours = modules
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, a in theirs.state_dict().items():
        assert torch.equal(a, ours.state_dict()[name]), name  # the same initial values
    for q in theirs.parameters():
        nn.init.normal_(q, std=0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def draw(kdim=E, vdim=E, batch_first=True):
    shapes = ((B, N, E), (B, M, kdim), (B, M, vdim))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return given if batch_first else [x.detach().transpose(0, 1).requires_grad_() for x in given]


def assert_same(theirs, ours, given, **call):
    expected, weights = theirs(*given, **call)
    got, ours_weights = ours(*given, **call)
    torch.testing.assert_close(got, expected)
    assert (weights is None) == (ours_weights is None)
    if weights is not None:
        torch.testing.assert_close(ours_weights, weights)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), [*given, *theirs.parameters()])
    grads = torch.autograd.grad((got * direction).sum(), [*given, *ours.parameters()])
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


OPTIONS = [
    {},
    {"bias": False},
    {"kdim": 5},
    {"kdim": 6, "vdim": 9},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("batch_first", "need_weights"), itertools.product((True, False), (True, False)))
def test_options(options, batch_first, need_weights):
    theirs, ours = pair(batch_first=batch_first, **options)
    given = draw(options.get("kdim", E), options.get("vdim", E), batch_first)
    assert_same(theirs, ours, given, need_weights=need_weights)


def masks():
    hidden = torch.rand(N, M) < 0.4
    hidden[:, 2] = False
    each = torch.rand(B * H, N, M) < 0.4
    each[..., 2] = False
    padding = torch.zeros(B, M, dtype=torch.bool)
    padding[0, 5:] = padding[1, :2] = True
    return hidden, each, padding


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("which", ["attn", "each", "padding", "both"])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks(kind, which, extra, need_weights):
    hidden, each, padding = masks()
    if kind == "float":
        hidden, each, padding = (
            torch.randn(x.shape, dtype=torch.float64).masked_fill(x, -torch.inf)
            for x in (hidden, each, padding)
        )
    theirs, ours = pair(batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    call = {
        "attn": {"attn_mask": hidden},
        "each": {"attn_mask": each},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": each, "key_padding_mask": padding},
    }[which]
    assert_same(theirs, ours, draw(), need_weights=need_weights, **call)


@pytest.mark.parametrize("average", [True, False])
def test_weights_by_head_and_unbatched(average):
    theirs, ours = pair()
    given = [x[0].detach().requires_grad_() for x in draw()]
    hidden, each, padding = masks()
    assert_same(theirs, ours, given, average_attn_weights=average)
    assert_same(theirs, ours, given, need_weights=False)
    call = {"attn_mask": each[:H], "key_padding_mask": padding[0], "average_attn_weights": average}
    assert_same(theirs, ours, given, **call)
    assert_same(theirs, ours, given, attn_mask=hidden, need_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
def test_pattern_is_the_mask_it_stands_for(need_weights):
    pattern = p.Window(2) | p.Sink(1)
    theirs, ours = pair(batch_first=True)
    x = torch.randn(B, N, E, dtype=torch.float64)
    for visible in (pattern, p.Causal() & pattern):
        hidden = ~visible.mask(N, N)[0, 0]
        expected, weights = theirs(x, x, x, attn_mask=hidden, need_weights=need_weights)
        got, ours_weights = ours(x, x, x, pattern=visible, need_weights=need_weights)
        torch.testing.assert_close(got, expected)
        if need_weights:
            torch.testing.assert_close(ours_weights, weights)
        built = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, pattern=visible)
        built.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(built(x, x, x, need_weights=need_weights)[0], expected)
    got, _ = ours(x, x, x, pattern=pattern, is_causal=True, need_weights=need_weights)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
def test_queries_that_see_nothing_give_the_bias_instead_of_nan(need_weights, kind):
    _, ours = pair(batch_first=True)
    given = draw()
    hidden = torch.zeros(N, M, dtype=torch.bool)
    hidden[1] = True
    padding = torch.zeros(B, M, dtype=torch.bool)
    padding[1] = True
    call = {
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.zeros(N, M, dtype=torch.float64).masked_fill(hidden, -torch.inf)},
        "padding": {"key_padding_mask": padding},
    }[kind]
    y, weights = ours(*given, need_weights=need_weights, **call)
    blind = y[1] if kind == "padding" else y[:, 1]
    torch.testing.assert_close(blind, ours.out_proj.bias.expand_as(blind))
    if need_weights:
        assert (weights[1] if kind == "padding" else weights[:, 1]).abs().max() == 0
    assert y.isfinite().all()
    for grad in torch.autograd.grad(y.pow(2).sum(), [*given, *ours.parameters()]):
        assert grad.isfinite().all()


def test_in_torchs_encoder_layer_the_pattern_acts_in_training_and_inference():
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, pattern=p.Window(1))
    ours.load_state_dict(layer.self_attn.state_dict())
    x = torch.randn(B, N, E, dtype=torch.float64)
    hidden = ~p.Window(1).mask(N, N)[0, 0]
    expected = layer(x, src_mask=hidden)
    layer.self_attn = ours
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


def test_dropout_in_training():
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, dropout=0.5, batch_first=True, add_bias_kv=True)
    x = torch.randn(1, N, E)
    for need_weights in (True, False):
        many = x.expand(6000, N, E)
        mean = ours.train()(many, many, many, need_weights=need_weights)[0].mean(0, keepdim=True)
        torch.testing.assert_close(mean, ours.eval()(x, x, x)[0], rtol=0, atol=0.03)


def test_is_reached_from_the_top():
    assert heedful.nn.MultiheadAttention is MultiheadAttention


@pytest.mark.door
def test_door():
    with pytest.raises(ValueError, match="num_heads is 5"):
        MultiheadAttention(E, 5)
    _, ours = pair(batch_first=True)
    with pytest.raises(ValueError, match="attn_mask has shape"):
        ours(*draw(), attn_mask=torch.zeros(N, N))
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        ours(*draw(), key_padding_mask=torch.zeros(B, N, dtype=torch.bool))
