"""Gaussian adaptive attention: the card number by number, sums, collapse and invariance of the weights."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.mixers.heads.gaam import GaussianAdaptiveAttention, GaussianBlock, gaussian_weights
from heedful.models.decoder_lm import DecoderLM


def literal(x, offsets, widths, padding_value=None, eps=1e-8):
    """The card's steps for one head and one line of numbers: (output, weights)."""
    padded = [padding_value is not None and float(a) == padding_value for a in x]
    counted = [a * 0 if hide else a for a, hide in zip(x, padded, strict=True)]
    mean = sum(counted) / len(x)
    var = sum((a - mean) ** 2 for a in counted) / (len(x) - 1) + eps
    weights = []
    for a in x:
        w = torch.ones((), dtype=x.dtype)
        for delta, c in zip(offsets, widths, strict=True):
            z = (a - mean - delta) / var.sqrt()
            w = w * torch.exp(-(z**2) / (2 * c**2)) / torch.sqrt(2 * math.pi * c**2)
        weights.append(w)
    total = sum(weights).clamp(min=eps)
    w = torch.stack(weights) / total
    return torch.stack([a if hide else a * b for a, b, hide in zip(x, w, padded, strict=True)]), w


def literal_heads(mixer, x):
    """All heads along the axis of the mixer."""
    lines = x.movedim(mixer.norm_axis, -1)
    size = lines.shape[-1] // mixer.heads
    cuts = [size] * (mixer.heads - 1) + [lines.shape[-1] - size * (mixer.heads - 1)]
    parts = [
        torch.stack(
            [
                torch.stack(
                    [literal(line, mixer.offsets[i], mixer.widths[i], mixer.padding_value)[0] for line in row]
                )
                for row in part
            ]
        )
        for i, part in enumerate(lines.split(cuts, -1))
    ]
    return torch.cat(parts, -1).movedim(-1, mixer.norm_axis)


def make(**options):
    mixer = GaussianAdaptiveAttention(6, dtype=torch.float64, **{"heads": 2, "gaussians": 3, **options})
    with torch.no_grad():
        mixer.offsets.add_(0.3 * torch.randn_like(mixer.offsets))
        mixer.widths.copy_(1 + torch.rand_like(mixer.widths))
    return mixer


@pytest.mark.parametrize("norm_axis", [1, 2])
@pytest.mark.parametrize(("heads", "gaussians"), [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("padding_value", [None, 0.0, 0.7])
def test_equals_the_card(norm_axis, heads, gaussians, padding_value):
    mixer = make(heads=heads, gaussians=gaussians, norm_axis=norm_axis, padding_value=padding_value)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    if padding_value is not None:
        x[0, 4:], x[1, 1, 2] = padding_value, padding_value
    x.requires_grad_()
    ours, expected = mixer(x), literal_heads(mixer, x)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((ours * weight).sum(), inputs)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want)


def test_a_mask_is_padding_of_zeros():
    mixer = make()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    zeroed = x.masked_fill(~mask[..., None], 0.0)
    padding = make(padding_value=0.0)
    padding.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x, mask=mask)[mask], padding(zeroed)[mask])
    assert torch.equal(mixer(x, mask=mask)[~mask], x[~mask])


def test_weights_sum_to_one_in_every_slice():
    mixer, x = make(heads=3), torch.randn(2, 7, 6, dtype=torch.float64)
    torch.nn.init.zeros_(mixer.offsets)  # an offset may leave no density above eps
    for part in mixer.weights(x).split((2, 2, 3), 1):
        torch.testing.assert_close(part.sum(1), torch.ones(2, 6, dtype=torch.float64))


def test_gaussians_of_one_offset_are_one_gaussian():
    x = torch.randn(3, 9, dtype=torch.float64)
    offset, widths = torch.full((4,), 0.2, dtype=torch.float64), 0.5 + torch.rand(4, dtype=torch.float64)
    joined = widths.square().reciprocal().sum().rsqrt()[None]
    torch.testing.assert_close(
        gaussian_weights(x, offset, widths), gaussian_weights(x, offset[:1], joined), rtol=1e-9, atol=1e-12
    )


def test_invariance():
    """Shifts never matter; scales matter only through the offsets."""
    x, zero = torch.randn(3, 9, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    widths, offsets = torch.tensor([0.7, -1.5]).double(), torch.tensor([0.5, 0.3]).double()
    torch.testing.assert_close(gaussian_weights(x + 5, offsets, widths), gaussian_weights(x, offsets, widths))
    torch.testing.assert_close(
        gaussian_weights(3 * x + 5, zero, widths), gaussian_weights(x, zero, -widths), rtol=1e-6, atol=1e-8
    )
    assert not torch.allclose(gaussian_weights(3 * x, offsets, widths), gaussian_weights(x, offsets, widths))


def test_many_narrow_gaussians_do_not_underflow_and_the_sum_has_a_floor():
    x = torch.randn(2, 9)
    narrow = gaussian_weights(x, torch.zeros(40), torch.full((40,), 0.01))
    assert narrow.isfinite().all()
    # In the middle of the widest gap no density reaches eps: weights are the densities over eps.
    far = torch.full((1,), 30.0).double()
    line = torch.randn(9, dtype=torch.float64)
    _, expected = literal(line, far, torch.ones(1, dtype=torch.float64))
    got = gaussian_weights(line[None], far, torch.ones(1, dtype=torch.float64))[0]
    torch.testing.assert_close(got, expected)
    assert got.sum() < 0.5


def test_block_adds_what_each_layer_reads():
    layers = [make(), make(norm_axis=2, heads=3), make()]
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    expected = x
    for layer in layers:
        expected = expected + literal_heads(layer, expected)
    torch.testing.assert_close(GaussianBlock(*layers)(x), expected)


def test_parameters_and_start():
    block = GaussianBlock(*(GaussianAdaptiveAttention(24, heads=4, gaussians=5) for _ in range(3)))
    assert sum(p.numel() for p in block.parameters()) == 3 * 4 * 2 * 5
    assert all(not layer.offsets.any() and (layer.widths > 0).all() for layer in block.layers)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_slices_of_one_number_or_none_are_finite(length):
    assert make(heads=3)(torch.randn(2, length, 6, dtype=torch.float64)).isfinite().all()


@pytest.mark.door
def test_door():
    for arguments, message in (
        ({"norm_axis": 0}, "norm_axis is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"gaussians": 0}, "gaussians is 0"),
        ({"heads": 7, "norm_axis": 2}, "heads is 7, must be at most dim"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianAdaptiveAttention(6, **arguments)
    with pytest.raises(ValueError, match="dim is 0"):
        GaussianAdaptiveAttention(0)
    with pytest.raises(ValueError, match="layers is empty"):
        GaussianBlock()


def test_over_channels_a_decoder_can_use_it():
    """No token sees another, so pieces are the whole and a language model takes it as causal."""
    mixer, x = make(causal=True), torch.randn(2, 7, 6, dtype=torch.float64)
    assert mixer.causal and mixer.norm_axis == 2 and make(norm_axis=2).causal and not make().causal
    y, state = mixer(x[:, :4], state=mixer.init_state(2))
    more, state = mixer(x[:, 4:], state=state)
    torch.testing.assert_close(torch.cat([y, more], 1), literal_heads(mixer, x))
    assert state.length == 7
    torch.manual_seed(0)
    model = DecoderLM(11, 16, depth=2, heads=4, mixers=["self-attention", "gaam"]).eval()
    ids = torch.randint(11, (2, 3))
    made = model.generate(ids, 4)
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


@pytest.mark.door
def test_door_of_causal():
    with pytest.raises(ValueError, match="norm_axis is 1, must be 2 with causal=True"):
        GaussianAdaptiveAttention(6, causal=True, norm_axis=1)
    with pytest.raises(ValueError, match="norm_axis is 1, must be 2 to decode"):
        GaussianAdaptiveAttention(6).init_state(1)
