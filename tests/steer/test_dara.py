"""Dynamic attention reallocation: factors on logits, and what can be learned with them."""

from __future__ import annotations

import pytest
import torch

from heedful.hf import Handler, tap
from heedful.steer import VisualAttentionReallocation
from heedful.steer.dara import image_index, reallocate
from tests.steer.contract import check_intervention
from tests.steer.models import llava, picture_prompt


def test_images_are_runs():
    image = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 1, 1]]).bool()
    assert image_index(image).tolist() == [[-1, 0, 0, -1, 1, -1], [0, 0, -1, 1, 1, 1]]


def test_scaling_columns_is_scaling_keys():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    factors = torch.rand(3, 2, dtype=torch.float64, generator=generator) + 0.5
    index = torch.tensor([[-1, 0, 1, 2, -1], [0, 0, -1, 1, 1]])
    scaled = k.clone()
    for b in range(2):
        for h in range(3):
            for j, i in enumerate(index[b].tolist()):
                if i >= 0:
                    scaled[b, h, j] *= factors[h, min(i, 1)]  # a third image takes the second's factor
    torch.testing.assert_close(reallocate(q @ k.mT, factors, index), q @ scaled.mT)
    hidden = (q @ k.mT).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    assert torch.equal(reallocate(hidden, -factors, index) == -torch.inf, hidden == -torch.inf)
    weights = reallocate(q @ k.mT, factors, index, "log").softmax(-1)
    odds = (q @ k.mT).exp()
    for b in range(2):
        for h in range(3):
            for j, i in enumerate(index[b].tolist()):
                odds[b, h, :, j] *= factors[h, min(i, 1)] if i >= 0 else 1
    torch.testing.assert_close(weights, odds / odds.sum(-1, keepdim=True))


def made(value: float) -> VisualAttentionReallocation:
    steer = VisualAttentionReallocation(4, images=2)
    with torch.no_grad():
        steer.factors.fill_(value)
    return steer


def test_contract():
    check_intervention(lambda: made(1.7), lambda: made(1.0), llava(), picture_prompt())


def test_only_the_factors_learn_and_only_the_first_layer_is_scaled():
    model, inputs = llava().requires_grad_(False), picture_prompt()
    steer = VisualAttentionReallocation(4)
    assert steer.factors.numel() == 20
    layers = []

    class Look(Handler):
        def logits(self, site, logits):
            if steer.wants(site):
                layers.append(site.layer)
            return logits

    with tap(model, Look()), steer(model):
        model(**inputs).logits.square().mean().backward()
    assert layers == [0]
    assert steer.factors.grad[:, 0].ne(0).all()  # one image: the other factors have no part
    assert not steer.factors.grad[:, 1:].any()


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="heads is 8, must be 4"), VisualAttentionReallocation(8)(llava()):
        pass
    with pytest.raises(ValueError, match="mode is 'add', must be one of"):
        VisualAttentionReallocation(4, mode="add")
