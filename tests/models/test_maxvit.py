"""MaxViT's own facts; a block and the model equal the authors' golden files (tests/parity)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful import authors
from heedful.authors.maxvit import tensorflow
from heedful.models.maxvit import Block, MaxViT, MBConv, SameConv


def test_convolutions_pad_the_odd_row_at_the_end() -> None:
    conv = SameConv(2, 3, 3, stride=2)
    for height, width, pads in ((6, 8, (0, 1, 0, 1)), (5, 7, (1, 1, 1, 1)), (5, 8, (0, 1, 1, 1))):
        x = torch.randn(1, 2, height, width)
        wanted = F.conv2d(F.pad(x, pads), conv.weight, conv.bias, stride=2)
        assert wanted.shape[2:] == (-(-height // 2), -(-width // 2))
        torch.testing.assert_close(conv(x), wanted)


def test_inverted_residual_equals_transcription_with_gradients() -> None:
    torch.manual_seed(0)
    m = MBConv(4, 6, stride=2).double().eval()
    with torch.no_grad():
        for name, tensor in [*m.named_parameters(), *m.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) if "var" in name else 0.3 * torch.randn_like(tensor))

    def norm(x: torch.Tensor, n: torch.nn.BatchNorm2d) -> torch.Tensor:
        y = (x - n.running_mean[:, None, None]) / (n.running_var + 1e-3).sqrt()[:, None, None]
        return y * n.weight[:, None, None] + n.bias[:, None, None]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())

    def pointwise(x: torch.Tensor, conv: torch.nn.Conv2d) -> torch.Tensor:
        bias = 0 if conv.bias is None else conv.bias[:, None, None]
        return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + bias

    x = torch.randn(2, 4, 6, 4, dtype=torch.float64, requires_grad=True)
    y = gelu(norm(pointwise(norm(x, m.pre_norm), m.conv1), m.norm1))
    y = F.conv2d(F.pad(y, (0, 1, 0, 1)), m.conv2.weight, stride=2, groups=24)
    y = gelu(norm(y, m.norm2))
    gate = pointwise(y.mean((2, 3), keepdim=True), m.se.fc1)
    assert gate.shape[1] == 1  # int(6 / 4)
    gate = pointwise(gate / (1 + (-gate).exp()), m.se.fc2)
    y = pointwise(y / (1 + (-gate).exp()), m.conv3)
    pooled = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    literal = y + pointwise(pooled, m.shortcut)
    torch.testing.assert_close(m(x), literal)
    wrt, up = (x, *m.parameters()), torch.randn_like(literal)
    torch.testing.assert_close(torch.autograd.grad(m(x), wrt, up), torch.autograd.grad(literal, wrt, up))


def test_rates_grow_with_the_number_of_the_block() -> None:
    model = MaxViT(**{**MaxViT.example, "depths": (1, 2, 1, 1)}, drop_path=0.5)
    rates = [b.attn_grid.drop_path.rate for stage in model.stages for b in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_resize_keeps_the_biases_where_the_size_stays_and_interpolates_else() -> None:
    torch.manual_seed(0)
    model = MaxViT(**{**MaxViT.example, "window": 3, "grid": 3}).eval()
    x = torch.randn(1, 3, 64, 64)
    y, mixer = model(x), model.stages[0][0].attn_grid.mixer
    table = mixer.relative_bias.detach().clone()
    model.resize(3)
    assert torch.equal(model(x), y)
    model.resize(5)
    assert mixer.relative_bias.shape == (2, 9, 9)
    assert mixer.size == 5
    torch.testing.assert_close(mixer.relative_bias[:, 4, 4], table[:, 2, 2])  # the middle stays the middle
    assert model(x).isfinite().all()


def test_tensorflow_keeps_what_is_not_its() -> None:
    block = Block(4, 4, stride=1, head_dim=2, window=2, grid=3)
    state = block.state_dict()
    assert tensorflow(state).keys() == state.keys()


def test_weights_of_timms_port() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    theirs = timm.create_model("maxvit_tiny_tf_224", img_size=64, depths=(1, 2, 1, 1), num_classes=5).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point() and "running_var" not in name:
                tensor.add_(0.02 * torch.randn_like(tensor))
        x = torch.randn(1, 3, 64, 64)
        ours = MaxViT(classes=5, depths=(1, 2, 1, 1), window=2, grid=2)
        authors.load(ours, theirs.state_dict()).eval()
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.door
def test_errors() -> None:
    with pytest.raises(ValueError, match="depths is"):
        MaxViT(depths=(1, 2))
    with pytest.raises(ValueError, match="size is 0"):
        MaxViT(**MaxViT.example).resize(0)
