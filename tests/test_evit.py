"""Token reorganisation, and the vision transformer made of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import heedful
from heedful import authors
from heedful.models.evit import EViT
from heedful.routing.evit import TokenReorganizer, annealed_keep_rate, follow_places
from heedful.testing.check_backbone import image, make


def test_keeps_in_the_order_of_attention_and_fuses_by_it():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)
    y, index = TokenReorganizer(keep_rate=0.4)(x, weights)
    rows = []
    for b in range(2):
        order = sorted(range(7), key=lambda j: -weights[b, j].item())
        kept, others = order[: math.ceil(0.4 * 7)], order[math.ceil(0.4 * 7) :]
        assert index[b].tolist() == kept
        extra = sum(weights[b, j] * x[b, 1 + j] for j in others)
        rows.append(torch.stack([x[b, 0], *(x[b, 1 + j] for j in kept), extra]))
    literal, up = torch.stack(rows), torch.randn_like(y)
    torch.testing.assert_close(y, literal)
    torch.testing.assert_close(*(torch.autograd.grad(z, (x, weights), up) for z in (y, literal)))
    dropped, same = TokenReorganizer(keep_rate=0.4, fuse=False)(x, weights)
    assert torch.equal(dropped, y[:, :-1])
    assert torch.equal(same, index)


def test_all_kept_stay_where_they_are():
    x = torch.randn(2, 8, 3)
    y, index = TokenReorganizer(keep_rate=1.0)(x, torch.rand(2, 7))
    assert y is x
    assert index is None
    assert TokenReorganizer(keep_rate=0.99)(x, torch.rand(2, 7))[1] is None  # rounded up


def test_published_numbers_of_patches():
    tokens, counts = torch.randn(1, 197, 2), []
    for _ in range(3):
        tokens, _ = TokenReorganizer(keep_rate=0.7)(tokens, torch.rand(1, tokens.shape[1] - 1))
        counts.append(tokens.shape[1] - 1)
    assert counts == [139, 99, 71]


def test_annealing():
    rates = [annealed_keep_rate(step, target=0.6, start=10, total=4) for step in (0, 10, 12, 14, 99)]
    assert rates == pytest.approx([1, 1, 0.8, 0.6, 0.6])


def test_places_follow_their_patches():
    start = torch.arange(5)[None]
    first = follow_places(start, torch.tensor([[3, 0]]), 5, fused=True)
    assert first.tolist() == [[1, 2, 2, 0, 2]]
    assert follow_places(first, torch.tensor([[2]]), 3, fused=True).tolist() == [[1, 0, 0, 1, 0]]
    first = follow_places(start, torch.tensor([[3, 0]]), 5, fused=False)
    assert first.tolist() == [[1, -1, -1, 0, -1]]
    assert follow_places(first, torch.tensor([[0]]), 2, fused=False).tolist() == [[-1, -1, -1, 0, -1]]


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


@pytest.mark.parametrize("fuse", [True, False])
def test_model_equals_transcription(fuse):
    """One image, one head at a time; each patch carries the places that it stands for."""
    model = make(EViT, fuse=fuse)
    x = image(model, size=(48, 48))
    for one, logits, kept0, kept1, features in zip(
        x, model(x), *model.kept(x), model.features(x)[0], strict=True
    ):
        patches = one.unfold(1, 16, 16).unfold(2, 16, 16).movedim(0, 2).flatten(2).flatten(0, 1)
        patches = patches @ model.embed.weight.flatten(1).T + model.embed.bias
        tokens = torch.cat([model.class_token[0], patches]) + model.positions[0]
        places = [{p} for p in range(9)]
        choices = [kept0.tolist(), kept1.tolist()]
        for number, block in enumerate(model.blocks):
            q, k, v = (norm(tokens, block.norm1) @ block.mixer.qkv.weight.T + block.mixer.qkv.bias).split(
                12, -1
            )
            heads, attended = [], 0
            for h in range(3):
                own = slice(4 * h, 4 * h + 4)
                weight = (q[:, own] @ k[:, own].T / 2).exp()
                weight = weight / weight.sum(-1, keepdim=True)
                heads.append(weight @ v[:, own])
                attended = attended + weight[0, 1:] / 3
            tokens = tokens + torch.cat(heads, -1) @ block.mixer.proj.weight.T + block.mixer.proj.bias
            if number < 2:
                order = sorted(range(len(places)), key=lambda j: -attended[j].item())
                keep = math.ceil(0.6 * len(places))
                assert choices[number] == order[:keep]
                rows = [tokens[0], *(tokens[1 + j] for j in order[:keep])]
                joined = [places[j] for j in order[:keep]]
                if fuse:
                    rows.append(sum(attended[j] * tokens[1 + j] for j in order[keep:]))
                    joined.append(set().union(*(places[j] for j in order[keep:])))
                tokens, places = torch.stack(rows), joined
            hidden = F.gelu(norm(tokens, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
            tokens = tokens + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        torch.testing.assert_close(logits, model.head(norm(tokens[0], model.norm)))
        literal = torch.zeros(9, 12, dtype=torch.float64)
        for token, where in zip(tokens[1:], places, strict=True):
            literal[sorted(where)] = token
        torch.testing.assert_close(features, literal.T.reshape(12, 3, 3))


def test_at_rate_1_it_is_deit_with_the_names_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(
        "deit_small_patch16_224", embed_dim=24, depth=4, num_heads=3, num_classes=5
    ).eval()
    model = EViT(classes=5, dim=24, depth=4, heads=3, layers=(1, 2))
    authors.load(model.eval(), theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert not torch.allclose(model(x), theirs(x), rtol=1e-4, atol=1e-4)
        model.set_keep_rate(1.0)
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)  # float32
        assert model.kept(x) == []


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="keep_rate is 0, must be above 0"):
        TokenReorganizer(keep_rate=0)
    with pytest.raises(ValueError, match=r"class_attention has shape \(1, 4\), must be \(1, 3\)"):
        TokenReorganizer()(torch.zeros(1, 4, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="layers is"):
        heedful.models.create("evit_small_70", layers=(3, 12), keep_rate=0.7)
    with pytest.raises(ValueError, match="keep_rate is"):
        EViT(keep_rate=(0.5, 0.7))
