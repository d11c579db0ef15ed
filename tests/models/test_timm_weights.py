"""Weights with timm's names: the model gives what timm's gives."""

from __future__ import annotations

import pytest
import torch

from heedful import authors, models

timm = pytest.importorskip("timm", reason="timm is not installed")

PAIRS = ["efficientvit_m0", "shvit_s1", "davit_tiny", "focalnet_tiny_srf", "gcvit_xxtiny"]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)
                tensor.add_(0.03 * noise)
    return model.eval()


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # float32, up to 40 layers with other orders of summation
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", PAIRS)
def test_same_logits(name: str) -> None:
    theirs = randomised(timm.create_model(name, num_classes=5))
    ours = authors.load(models.create(name, classes=5), theirs.state_dict()).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_near(ours(x), theirs(x))


def test_focalnet_with_norms_behind_and_gammas() -> None:
    theirs = randomised(
        timm.models.focalnet.FocalNet(
            depths=(1, 1, 1, 1),
            embed_dim=8,
            num_classes=5,
            focal_levels=(3,) * 4,
            focal_windows=(5,) * 4,
            use_post_norm=True,
            use_overlap_down=True,
            layerscale_value=1e-4,
        )
    )
    ours = models.create("focalnet_large_fl3", classes=5, depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))
    authors.load(ours, theirs.state_dict()).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_near(ours(x), theirs(x))


def test_poolformer_up_to_the_head() -> None:
    """timm's head norms the mean of the last map; the authors' takes the mean of the normed map, as here."""
    theirs = randomised(timm.create_model("poolformer_s12", num_classes=5))
    ours = authors.load(models.create("poolformer_s12", classes=5), theirs.state_dict()).eval()
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert_near(ours.features(x)[-1], theirs.forward_features(x))
