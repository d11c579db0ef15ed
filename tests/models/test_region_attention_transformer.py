"""RAT as a whole: what is added where, its blocks and its loss, any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from heedful.models.region_attention_transformer import (
    Block,
    Layer,
    NAFBlock,
    RegionAttentionTransformer,
    WindowAttention,
    focal_region_loss,
)


def random(model):
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


def norm(x, layer):
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def linear(x, layer):
    return torch.einsum("oc,bchw->bohw", layer.weight.flatten(1), x) + layer.bias[:, None, None]


def test_naf_block():
    m = random(NAFBlock(4))
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    z = F.conv2d(linear(norm(x, m.norm1), m.conv1), m.conv2.weight, m.conv2.bias, padding=1, groups=8)
    s = z[:, :4] * z[:, 4:]
    y = x + m.beta * linear(s * linear(s.mean((2, 3), keepdim=True), m.attend), m.conv3)
    z = linear(norm(y, m.norm2), m.conv4)
    torch.testing.assert_close(m(x), y + m.gamma * linear(z[:, :4] * z[:, 4:], m.conv5))


def test_windows():
    m = random(WindowAttention(6, heads=3))
    x = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    wanted = torch.zeros_like(x)
    for top in range(0, 8, 4):
        for left in range(0, 12, 4):
            t = x[:, :, top : top + 4, left : left + 4].flatten(2).mT
            q, k, v = (t @ m.qkv.weight.T + m.qkv.bias).split(6, dim=-1)
            heads = [
                (q[..., c : c + 2] @ k[..., c : c + 2].mT / 3**0.5).softmax(-1) @ v[..., c : c + 2]
                for c in (0, 2, 4)
            ]
            y = torch.cat(heads, -1) @ m.proj.weight.T + m.proj.bias
            wanted[:, :, top : top + 4, left : left + 4] = y.mT.unflatten(2, (4, 4))
    torch.testing.assert_close(m(x), wanted)


def test_layer_and_block():
    block = random(Block(6, heads=3, mlp_ratio=2.0))
    x = torch.randn(2, 6, 8, 4, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 8, 4))
    y = x
    for m in block.layers:
        y = y + m.region_scale * m.region(norm(y, m.region_norm), labels=labels)
        hidden = F.gelu(linear(norm(y, m.region_mlp_norm), m.region_mlp.fc1))
        y = y + linear(hidden, m.region_mlp.fc2)
        y = y + m.window_scale * m.window(norm(y, m.window_norm))
        hidden = F.gelu(linear(norm(y, m.window_mlp_norm), m.window_mlp.fc1))
        y = y + linear(hidden, m.window_mlp.fc2)
    y = x + F.conv2d(y, block.conv.weight, block.conv.bias, padding=1)
    torch.testing.assert_close(block(x, labels), y)


def test_scales_start_at_0():
    layer, naf = Layer(8, heads=2, mlp_ratio=2.0), NAFBlock(8)
    for scale in (layer.region_scale, layer.window_scale, naf.beta, naf.gamma):
        assert not scale.any()


@pytest.mark.parametrize("scale", [1, 2])
def test_what_is_added_where(scale):
    model = random(RegionAttentionTransformer(**{**RegionAttentionTransformer.example, "scale": scale}))
    small = torch.rand(1, 1, 32 // scale, 48 // scale, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, 32, 48))
    x = F.interpolate(small, size=(32, 48), mode="bilinear") if scale > 1 else small
    first = model.encoders[0](F.conv2d(x, model.intro.weight, model.intro.bias, padding=1))
    second = model.encoders[1](F.conv2d(first, model.downs[0].weight, model.downs[0].bias, stride=2))
    y = bottom = F.conv2d(second, model.downs[1].weight, model.downs[1].bias, stride=2)
    for block in model.middle:
        y = block(y, labels[:, ::4, ::4])
    y = y + bottom
    for up, decoder, skip in zip(model.ups, model.decoders, (second, first), strict=True):
        y = decoder(F.pixel_shuffle(F.conv2d(y, up[0].weight), 2) + skip)
    y = F.conv2d(y, model.ending.weight, model.ending.bias, padding=1) + x
    torch.testing.assert_close(model(small, labels), y)


def test_any_size_is_the_image_with_its_border_repeated():
    model = random(RegionAttentionTransformer(**RegionAttentionTransformer.example))
    x, labels = torch.rand(2, 1, 17, 5, dtype=torch.float64), torch.randint(0, 3, (2, 17, 5))
    wide = F.pad(x, (0, 11, 0, 15), mode="replicate")
    known = F.pad(labels.double(), (0, 11, 0, 15), mode="replicate")
    torch.testing.assert_close(model(x, labels), model(wide, known)[:, :, :17, :5])
    assert model(x).shape == x.shape


def test_every_parameter_is_reached():
    model = random(RegionAttentionTransformer(**RegionAttentionTransformer.example))
    model(**model.example_inputs(dtype=torch.float64)).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_focal_loss_region_by_region():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True), torch.rand(2, 3, 4, 5)
    b, labels = b.double(), torch.randint(0, 3, (2, 4, 5)) * 7 - 5
    error = (a - b).abs()
    weight = torch.zeros(2, 1, 4, 5, dtype=torch.float64)
    for image in range(2):
        for label in labels[image].unique():
            own = labels[image] == label
            weight[image, 0, own] = error[image, :, own].mean().detach()
    wanted = (error * (1 + 0.5 * weight / weight.max())).mean()
    ours = focal_region_loss(a, b, labels, beta=0.5)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(torch.autograd.grad(ours, a), torch.autograd.grad(wanted, a))
    assert float(focal_region_loss(b, b, labels)) == 0


@pytest.mark.door
def test_errors():
    with pytest.raises(ValueError, match="the layers of a block is 3, must divide middle, which is 4"):
        RegionAttentionTransformer(middle=4)
    with pytest.raises(ValueError, match="must be as long as encoders"):
        RegionAttentionTransformer(decoders=(1,))
    model = RegionAttentionTransformer(**RegionAttentionTransformer.example)
    with pytest.raises(ValueError, match="labels has shape"):
        model(torch.zeros(1, 1, 16, 16), torch.zeros(1, 4, 4))
