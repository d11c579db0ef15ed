"""Paths of pre-norm networks: they add up, cuts and weights reach the classifier alone, and frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from heedful.inspect import (
    ResidualPaths,
    ablate_paths,
    path_components,
    path_distillation,
    relative_log_amplitude,
    reweighted,
)
from heedful.inspect.path_ensemble import rescaled
from heedful.mixers.heads.ensemble_scale import EnsembleScale
from heedful.mixers.heads.self_attention import SelfAttention
from heedful.models.block import Block

F64 = torch.float64


class Small(nn.Module):
    """A pre-norm network of two layers with a classifier of tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(SelfAttention(8, heads=2), mlp="gelu", hidden=6) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture
def network():
    model = Small().double()
    branches = [part for block in model.blocks for part in (block.mixer, block.mlp)]
    return model, ResidualPaths(model.blocks[0].norm1, branches, model.norm), torch.randn(2, 5, 8, dtype=F64)


def literal(model, x):
    """x_0, a_0, f_0, a_1, f_1, by the card."""
    found = [x]
    for block in model.blocks:
        a = block.mixer(block.norm1(x))
        f = block.mlp(block.norm2(x + a))
        found += [a, f]
        x = x + a + f
    return found


def test_components_are_the_terms_of_the_sum(network):
    model, paths, x = network
    found = path_components(paths, lambda: model(x))
    for ours, wanted in zip(found, literal(model, x), strict=True):
        torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(model.head(model.norm(sum(found))), model(x))


def test_ones_change_no_bit_and_zeros_cut(network):
    model, paths, x = network
    plain, terms = model(x), literal(model, x)
    with reweighted(paths, torch.ones(5)):
        assert torch.equal(model(x), plain)
    for cut in ((0,), (0, 1, 2), (3,)):
        weights = torch.tensor([float(i not in cut) for i in range(5)])
        wanted = model.head(model.norm(sum(c for i, c in enumerate(terms) if i not in cut)))
        with reweighted(paths, weights):
            torch.testing.assert_close(model(x), wanted)
            torch.testing.assert_close(model(x), wanted)
    assert torch.equal(model(x), plain)  # the model is as it was


def test_gradients_of_the_scales_are_products_with_the_components(network):
    model, paths, x = network
    scale = EnsembleScale(8, components=5, cut=(0, 2), dtype=F64)
    nn.init.normal_(scale.weight)
    with reweighted(paths, scale.table):
        y = model(x)
    terms = literal(model, x)
    total = (scale.weight[0] * terms[1] + scale.weight[1] * terms[3] + scale.weight[2] * terms[4]).detach()
    total.requires_grad_()
    torch.testing.assert_close(scale(iter(terms)), total)
    expected = model.head(model.norm(total))
    torch.testing.assert_close(y, expected)
    (slope,) = torch.autograd.grad(expected.sin().sum(), total)
    (grad,) = torch.autograd.grad(y.sin().sum(), scale.weight)
    for row, i in zip(grad, (1, 3, 4), strict=True):
        torch.testing.assert_close(row, (terms[i] * slope).sum((0, 1)))


def test_training_the_scales_with_the_network(network):
    model, paths, x = network
    scale = EnsembleScale(8, components=5, dtype=F64)
    assert torch.equal(scale.table(), torch.ones(5, 8, dtype=F64))
    parameters = [*model.parameters(), *scale.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    target = torch.randn(2, 5, 3, dtype=F64)
    losses = []
    with reweighted(paths, scale.table):
        for _ in range(20):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(q.grad is not None and q.grad.any() for q in scale.parameters())


def test_ablation(network):
    model, paths, x = network
    target = torch.randint(0, 3, (2, 5))

    def accuracy():
        return float((model(x).argmax(-1) == target).double().mean())

    terms = literal(model, x)
    wanted = [
        float((model.head(model.norm(sum(terms) - c)).argmax(-1) == target).double().mean()) for c in terms
    ]
    assert ablate_paths(paths, accuracy).tolist() == pytest.approx(wanted)


def test_a_missing_branch_is_noticed(network):
    model, paths, x = network
    part = ResidualPaths(paths.first, paths.branches[:-1], paths.last)
    with pytest.raises(ValueError, match="do not add up"):
        path_components(part, lambda: model(x))
    with pytest.raises(ValueError, match="gave 10 components and 2 sums"):
        path_components(paths, lambda: (model(x), model(x)))


def test_a_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.vision_transformer.VisionTransformer(**options).eval()
    branches = [part for block in model.blocks for part in (block.drop_path1, block.drop_path2)]
    paths = ResidualPaths(model.blocks[0].norm1, branches, model.norm)
    x = torch.randn(2, 3, 16, 16)
    assert len(path_components(paths, lambda: model(x))) == 5
    with torch.no_grad(), reweighted(paths, torch.ones(5)):
        inside = model(x)
    assert torch.equal(inside, model(x))


def test_distillation_teaches_the_short_path():
    torch.manual_seed(0)
    short = torch.randn(4, 3, dtype=F64, requires_grad=True)
    long = torch.randn(4, 3, dtype=F64, requires_grad=True)
    loss = path_distillation(short, long, temperature=2.0)
    p, q = ((x.detach() / 2).softmax(-1) for x in (short, long))
    wanted = 4 * sum(float(p[i, c]) * math.log(p[i, c] / q[i, c]) for i in range(4) for c in range(3)) / 4
    assert float(loss.detach()) == pytest.approx(wanted)
    loss.backward()
    assert long.grad is None
    assert short.grad.abs().sum() > 0
    assert path_distillation(short, short) == 0


def test_amplitudes_by_frequency():
    place = torch.arange(8, dtype=F64)
    wave = 1 + 0.5 * torch.cos(2 * math.pi * 2 * place / 8)[:, None] + 0 * place
    noise = 1e-9 * torch.randn(1, 64, 1, dtype=F64)
    found = relative_log_amplitude(wave.reshape(1, 64, 1) + noise, (8, 8))
    assert found.shape == (5,)
    # Two of the 16 frequencies of ring 2 have a quarter of the constant's amplitude.
    assert float(found[2]) == pytest.approx(math.log(0.25 * 2 / 16), rel=1e-5)
    assert (found[[1, 3, 4]] < -15).all()
    flat = relative_log_amplitude(torch.randn(64, 48, 32, dtype=F64), (6, 8))
    assert flat.shape == (4,)
    assert flat.abs().max() < 0.15  # 2048 maps: each frequency scatters by some percent
    smooth = torch.randn(64, 64, 8, dtype=F64).unflatten(1, (8, 8))
    smooth = sum(smooth.roll(s, (1, 2)) for s in ((0, 0), (0, 1), (1, 0), (1, 1)))
    assert relative_log_amplitude(smooth.flatten(1, 2), (8, 8))[-1] < -1


@pytest.mark.door
def test_door(network):
    model, paths, x = network
    with pytest.raises(ValueError, match=r"cut is \(0, 1\), must be some of 0 to 1"):
        EnsembleScale(4, components=2, cut=(0, 1))
    with pytest.raises(ValueError, match="components are 2, must be 3"):
        EnsembleScale(4, components=3)(torch.zeros(2, 1, 1, 4))
    with (
        reweighted(paths, torch.ones(4)),
        pytest.raises(ValueError, match="weights are for 4 paths, must be for 5"),
    ):
        model(x)
    with pytest.raises(ValueError, match=r"shape is \(2, 2\)"):
        relative_log_amplitude(torch.zeros(1, 5, 2), (2, 2))


def test_scales_inside_the_network(network):
    """x <- x + w_i branch_i(x), by hand, and gradients of the weights."""
    model, paths, x = network
    weights = torch.rand(4, 8, dtype=F64, requires_grad=True)

    def by_hand(w):
        y = x
        for i, block in enumerate(model.blocks):
            y = y + w[2 * i] * block.mixer(block.norm1(y))
            y = y + w[2 * i + 1] * block.mlp(block.norm2(y))
        return model.head(model.norm(y))

    with rescaled(paths, lambda: weights):
        ours = model(x)
    torch.testing.assert_close(ours, by_hand(weights))
    (grad,) = torch.autograd.grad(ours.sin().sum(), weights, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(by_hand(weights).sin().sum(), weights)[0])
    with rescaled(paths, torch.ones(4)):
        assert torch.equal(model(x), by_hand(torch.ones(4)))
    with (
        pytest.raises(ValueError, match="weights are for 5 branches, must be for 4"),
        rescaled(paths, torch.ones(5)),
    ):
        model(x)
