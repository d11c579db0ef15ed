"""heedful's models and mixers beside timm's."""

from __future__ import annotations

import pytest
import timm
import torch

import heedful.models.timm  # noqa: F401  registers the models
from heedful import models
from heedful.models import replace_attention


def vit(**how):
    torch.manual_seed(0)
    how = {"img_size": (32, 48), "patch_size": 16, "depth": 2, "embed_dim": 24, "num_heads": 3, **how}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **how).eval()


def test_every_backbone_has_a_timm_name():
    assert "heed_biformer_tiny" in timm.list_models("heed_*")
    small = timm.create_model("heed_biformer_tiny", num_classes=7, in_chans=1, depths=(1, 1, 1, 1))
    assert (small.num_classes, small.num_features) == (7, 512)
    assert small.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 7)


def test_features_only():
    model = timm.create_model("heed_biformer_tiny", features_only=True, depths=(1, 1, 1, 1)).eval()
    maps = model(torch.randn(1, 3, 64, 64))
    assert model.feature_info.channels() == [y.shape[1] for y in maps]
    assert model.feature_info.reduction() == [64 // y.shape[2] for y in maps] == [4, 8, 16, 32]


@pytest.mark.parametrize("name", ["mala", "biformer"])
def test_a_grid_mixer_in_a_vit(name):
    how = {"mala": {}, "biformer": {"regions": 2}}[name]
    model = vit(class_token=False, global_pool="avg")
    before = models.parameters(model)
    old = models.parameters(model.blocks[0].attn)
    assert replace_attention(model, name, **how) is model
    new = models.parameters(model.blocks[1].attn)
    assert models.parameters(model) == before + 2 * (new - old)
    assert model.blocks[0].attn.mixer.heads == 3
    x = torch.randn(2, 3, 32, 48)
    assert model(x).shape == (2, 5)
    # The map has the image's height and width: patches of a row are neighbours.
    y = torch.randn(2, 6, 24)
    grid = y.transpose(1, 2).reshape(2, 24, 2, 3)
    wanted = model.blocks[0].attn.mixer(grid).reshape(2, 24, 6).transpose(1, 2)
    torch.testing.assert_close(model.blocks[0].attn(y), wanted)


def test_a_sequence_mixer_sees_the_class_token():
    model = replace_attention(vit(), "self-attention")
    y = torch.randn(2, 7, 24)
    torch.testing.assert_close(model.blocks[0].attn(y), model.blocks[0].attn.mixer(y))
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 5)


@pytest.mark.door
def test_errors_leave_the_model_as_it_was():
    model = vit()
    attention = model.blocks[0].attn
    for name, message in (
        ("mala", "model has 1 class or register tokens"),
        ("eca", "'eca' is a channel mixer"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_attention(model, name)
    with pytest.raises(ValueError, match="must divide"):
        replace_attention(model, "self-attention", heads=5)
    assert model.blocks[0].attn is attention
    with pytest.raises(ValueError, match="model is a Linear, must have blocks with attn"):
        replace_attention(torch.nn.Linear(1, 1), "sqa")
    with pytest.raises(ValueError, match="pretrained is True, must be False"):
        timm.create_model("heed_biformer_tiny", pretrained=True)
