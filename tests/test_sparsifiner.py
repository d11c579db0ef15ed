"""Sparsifiner: attention to predicted keys among tokens, and the vision transformer made of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.mixers.grid.sparsifiner import SparsifinerAttention
from heedful.models.sparsifiner import Sparsifiner
from heedful.routing.connectivity import reconstruction_loss
from heedful.testing.check_backbone import image, make

OPTIONS = {"heads": 2, "size": (3, 4), "reduce_tokens": 2, "coefficients": 3}


def build(**options):
    torch.manual_seed(0)
    mixer = SparsifinerAttention(6, **{**OPTIONS, **options}, dtype=torch.float64)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer, torch.randn(2, 13, 6, dtype=torch.float64, requires_grad=True)


def literal(mixer, x, keys_of):
    """One head of one query at a time; keys_of(b, h, i): the keys that it sees."""
    rows = []
    for b in range(2):
        q, k, v = (x[b] @ mixer.qkv.weight.T + mixer.qkv.bias).split(6, -1)
        tokens = []
        for i in range(13):
            heads = []
            for h in range(2):
                own, seen = slice(3 * h, 3 * h + 3), keys_of(b, h, i)
                weight = (k[seen, own] @ q[i, own] / 3**0.5).exp()
                heads.append(weight @ v[seen, own] / weight.sum())
            tokens.append(mixer.proj.weight @ torch.cat(heads) + mixer.proj.bias)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def test_patches_see_the_keys_picked_and_the_class_token_all():
    mixer, x = build()
    query, key, _ = mixer.heads_of(x)
    scores, _ = mixer.predictor.scores(query, key)

    def keys_of(b, h, i):
        order = sorted(range(13), key=lambda j: -scores[b, h, i - 1, j].item())
        return sorted(order[:4]) if i else list(range(13))  # ceil(13 / 4)

    wanted, y, up = literal(mixer, x, keys_of), mixer(x), torch.randn_like(x)
    torch.testing.assert_close(y, wanted)
    leaves = [x, *mixer.qkv.parameters(), *mixer.proj.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(z, leaves, up, retain_graph=True) for z in (y, wanted)))
    untaught = torch.autograd.grad(y.sum(), [*mixer.predictor.parameters()], allow_unused=True)
    assert all(gradient is None for gradient in untaught)


def test_dense_phase_is_complete_attention_beside_its_estimate():
    mixer, x = build()
    y, estimate, weights = mixer.dense(x)
    torch.testing.assert_close(y, literal(mixer, x, lambda *_: list(range(13))))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 13, dtype=torch.float64))
    torch.testing.assert_close(build(keep_rate=1.0)[0](x), y)
    loss = reconstruction_loss(estimate, weights.detach())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, [*mixer.predictor.parameters()]))


def test_pruned_patches_are_zeros_that_nobody_picks():
    mixer, x = build()
    active = torch.ones(2, 12, dtype=torch.bool)
    active[:, [2, 7]] = False
    y = mixer(x, active=active)
    other = x.detach().clone()
    other[:, [3, 8]] += 1
    torch.testing.assert_close(mixer(other, active=active)[:, 1:3], y[:, 1:3])


def test_model():
    model = make(Sparsifiner)
    x = image(model)
    tokens, size = model.embedded(x)
    assert size == (4, 4)
    for block in model.blocks:
        tokens = tokens + block.mixer(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(model(x), model.head(model.norm(tokens[:, 0])))
    (last,) = model.features(F.pad(x, (0, 32)))  # 4 x 6 patches: the predictor's tables follow
    assert last.shape == (2, 12, 4, 6)
    logits, estimates, weights = make(Sparsifiner, keep_rate=1.0).dense(x)
    torch.testing.assert_close(logits, make(Sparsifiner, keep_rate=1.0)(x))
    assert [e.shape for e in estimates] == [(2, 3, 16, 17)] * 2
    assert [w.shape for w in weights] == [(2, 3, 17, 17)] * 2


def test_gradients_reach_all_but_the_predictors_and_they_learn_in_the_dense_phase():
    for features_only in (False, True):
        model = make(Sparsifiner, features_only=features_only)
        y = model(image(model))
        (y[0] if features_only else y).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (".predictor." in name), name
            assert parameter.grad is None or parameter.grad.any(), name
    model = make(Sparsifiner)
    logits, estimates, weights = model.dense(image(model))
    loss = sum(reconstruction_loss(e, w.detach()) for e, w in zip(estimates, weights, strict=True))
    (logits.square().sum() + loss).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 4, must divide dim"):
        SparsifinerAttention(6, heads=4)
    with pytest.raises(ValueError, match="query has 5 tokens, must have 13"):
        build()[0](torch.zeros(1, 5, 6, dtype=torch.float64))
