"""The Gaussian adaptive transformer: counts, a frozen encoder left as found, padding, learning, layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heedful.inspect import importance_factor
from heedful.mixers.heads.gaam import gaussian_weights
from heedful.models import GaussianAdaptiveTransformer

transformers = pytest.importorskip("transformers")


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertModel(config, add_pooling_layer=False)


class Planted(nn.Module):
    """Layers of noise, new in each call and the same for all tokens; layer 2 alone tells the class."""

    def __init__(self, level):
        super().__init__()
        self.config = transformers.BertConfig(hidden_size=4, num_hidden_layers=5)
        self.level = level

    def forward(self, input_ids, output_hidden_states):
        b, n = input_ids.shape
        states = [torch.randn(b, 1, 4).expand(b, n, 4) for _ in range(6)]
        states[2] = self.level + 0.3 * (2.0 * input_ids - 1)[..., None].expand(b, n, 4)
        return transformers.modeling_outputs.BaseModelOutput(hidden_states=tuple(states))


@pytest.mark.parametrize("norm_axis", [1, 3])
def test_equals_the_steps(norm_axis):
    encoder = bert().double().eval()
    model = GaussianAdaptiveTransformer(
        encoder, 2, blocks=1, heads=1, gaussians=2, norm_axis=norm_axis, hidden=5, dtype=torch.float64
    )
    ids = torch.randint(23, (2, 6))
    s = torch.stack(encoder(ids, output_hidden_states=True).hidden_states, 1)
    layer = model.block.layers[0]
    s = s + s * gaussian_weights(s, layer.offsets[0], layer.widths[0], axis=norm_axis)
    h = F.gelu(s.mean(1) @ model.inner.weight.T + model.inner.bias).mean(1)
    expected = h @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(input_ids=ids), expected)


def test_only_its_own_parameters_train_and_the_encoder_stays_as_found():
    encoder = bert().train()
    encoder.encoder.layer[1].eval()
    encoder.embeddings.word_embeddings.weight.requires_grad_(False)
    modes = [m.training for m in encoder.modules()]
    flags = [p.requires_grad for p in encoder.parameters()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = GaussianAdaptiveTransformer(encoder, 3, heads=2, gaussians=5, hidden=8)
    count = 3 * 2 * 2 * 5 + (12 * 8 + 8) + (8 * 3 + 3)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(value.numel() for value in model.state_dict().values()) == count
    ids = torch.randint(23, (4, 6))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    F.cross_entropy(model(input_ids=ids), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert all(p.grad is None for p in encoder.parameters())
    assert [m.training for m in encoder.modules()] == modes
    assert [p.requires_grad for p in encoder.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    # An encoder that raises is left as found too.
    with pytest.raises(IndexError):
        model(input_ids=ids + 23)
    assert [m.training for m in encoder.modules()] == modes


@pytest.mark.parametrize("norm_axis", [1, 3])
def test_padding_changes_nothing(norm_axis):
    model = GaussianAdaptiveTransformer(bert(), 3, heads=2, norm_axis=norm_axis)
    ids = torch.randint(23, (2, 5))
    padded = torch.cat([ids, torch.randint(23, (2, 4))], 1)
    mask = torch.arange(9).expand(2, 9) < 5
    # Rounding of float32: the encoder's kernels differ with the length.
    torch.testing.assert_close(
        model(mask.long(), input_ids=padded), model(input_ids=ids), atol=1e-5, rtol=1e-4
    )
    short, _ = model.weights(input_ids=ids)
    weights, shown = model.weights(mask.long(), input_ids=padded)
    assert len(weights) == 3 and weights[0].shape == (2, 4, 9, 12)
    for one, other in zip(short, weights, strict=True):
        torch.testing.assert_close(
            importance_factor(other, axis=1, shown=shown),
            importance_factor(one, axis=1),
            atol=1e-4,
            rtol=1e-3,
        )


def trained(encoder, ids, labels, steps):
    """A model that has learnt the labels, its loss, and the layers' factors before and after."""
    torch.manual_seed(0)
    model = GaussianAdaptiveTransformer(encoder, 2, blocks=1, heads=1, gaussians=1, hidden=8)
    before = importance_factor(model.weights(input_ids=ids)[0][0], axis=1)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(steps):
        loss = F.cross_entropy(model(input_ids=ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = importance_factor(model.weights(input_ids=ids)[0][0], axis=1)
    return model, loss, before, after


def test_learns():
    torch.manual_seed(0)
    ids = torch.randint(23, (24, 6))
    labels = torch.arange(24) % 2
    model, loss, _, _ = trained(bert(), ids, labels, 150)
    assert loss < 0.1 and (model(input_ids=ids).argmax(1) == labels).all()


def test_importance_points_to_the_planted_layer():
    """Training narrows the Gaussian about the mean, where the layer that tells is: it stands out the more."""
    labels = torch.arange(64) % 2
    _, _, before, after = trained(Planted(0.0), labels[:, None].expand(64, 2), labels, 300)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert after.argmax() == 2
    assert after[2] - after[others].max() > (before[2] - before[others].max()) + 0.05


def test_importance_misses_a_layer_off_the_level_of_the_others():
    """Weights follow values: a layer far from the mean gets the least, though it alone tells the class."""
    labels = torch.arange(64) % 2
    _, loss, _, after = trained(Planted(4.0), labels[:, None].expand(64, 2), labels, 100)
    assert loss < 0.69 and after.argmin() == 2


@pytest.mark.door
def test_door():
    encoder = bert()
    for arguments, message in (
        ({"norm_axis": 2}, "norm_axis is 2"),
        ({"heads": 3}, "heads is 3, must be at most 2"),
        ({"heads": 7, "norm_axis": 3}, "heads is 7, must be at most 6"),
        ({"hidden": 0}, "hidden is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianAdaptiveTransformer(encoder, 2, **arguments)
    with pytest.raises(ValueError, match="encoder is Linear, must have a config with hidden_size"):
        GaussianAdaptiveTransformer(nn.Linear(2, 2), 2)
    model = GaussianAdaptiveTransformer(encoder, 2, heads=2)
    model.depth = 9
    with pytest.raises(ValueError, match="encoder gives 4 hidden_states"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
