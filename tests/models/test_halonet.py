"""HaloNet's own facts; its attention is tested in tests/mixers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful import authors, models
from heedful.models.halonet import HaloNet


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    y = (x - norm.running_mean[:, None, None]) / (norm.running_var + 1e-5).sqrt()[:, None, None]
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]


def conv(x: Tensor, part: nn.Module, stride: int = 1) -> Tensor:
    y = F.conv2d(x, part.conv.weight, None, stride, part.conv.weight.shape[-1] // 2)
    return batch_norm(y, part.norm)


def transcription(model: HaloNet, x: Tensor) -> Tensor:
    """The steps around the attention."""
    x = F.max_pool2d(conv(x, model.stem[0], 2).clamp(min=0), 3, 2, 1)
    for number, stage in enumerate(model.stages):
        for place, block in enumerate(stage):
            y = conv(x, block.conv1).clamp(min=0)
            y = batch_norm(block.mixer(y), block.norm).clamp(min=0)
            y = conv(y, block.conv2)
            if place == 0:  # the width or the size of the map changes
                x = conv(x, block.shortcut, 2 if number else 1)
            x = (x + y).clamp(min=0)
    return conv(x, model.final[0]).clamp(min=0).mean((2, 3)) @ model.head.weight.T + model.head.bias


def test_equals_transcription_with_gradients() -> None:
    torch.manual_seed(0)
    how = {**HaloNet.example, "depths": (1, 2, 1, 1), "value_ratio": 1.5, "out_ratio": 2}
    model = HaloNet(**how).double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) if "var" in name else 0.2 * torch.randn_like(tensor))
    x = torch.randn(2, 3, 64, 70, dtype=torch.float64, requires_grad=True)
    ours, literal = model(x), transcription(model, x)
    torch.testing.assert_close(ours, literal)
    wrt, up = (x, *model.parameters()), torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, wrt, up), torch.autograd.grad(literal, wrt, up), rtol=1e-6, atol=1e-9
    )


def test_counts_are_the_published_ones_and_that_of_timm() -> None:
    published = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h3": 11.8, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}
    for name, millions in published.items():
        counted = models.find(f"halonet_{name}").parameters
        # The published count of h6 is cut, not rounded.
        assert abs(counted / 1e6 - millions) < (0.1 if name == "h6" else 0.05)
    with torch.device("meta"):
        assert models.parameters(HaloNet(heads=(8, 8, 8, 8))) == 8_100_056


def test_weights_of_timms_h1() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    theirs = timm.create_model("halonet_h1", num_classes=5).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point() and "running_var" not in name:
                tensor.add_(0.02 * torch.randn_like(tensor))
        ours = authors.load(HaloNet(classes=5, heads=(8, 8, 8, 8)), theirs.state_dict()).eval()
        x = torch.randn(1, 3, 256, 256)  # timm takes maps that the blocks divide
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="heads is"):
        HaloNet(heads=(4, 8))
